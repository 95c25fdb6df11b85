"""The machine's values in a person's files: `${system.hostname}`, `${values.editor}`, `${screen.dpi}`; `$$` is a `$`.

Nothing but a name may stand there: a template is text with holes, not a program.
"""

import difflib
import re
import string
from collections.abc import Iterable, Mapping

from provision.layers import nearest

KINDS = "; expected name, SECTION.SETTING, values.NAME or screen.scale, .dpi, .font_size"


class Template(string.Template):
    """`string.Template` whose names may have dots, and of which only `${name}` counts: a shell's $1 and $HOME stay."""

    flags = re.VERBOSE  # and not IGNORECASE
    pattern = r"""
    \$(?:
      (?P<escaped>\$)(?=\{)      |  # $${name} is ${name}
      (?!)(?P<named>)            |
      \{(?P<braced>[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)*)\} |
      (?P<invalid>\{)
    )
    """  # type: ignore[assignment]


def check_template(text: str, known: Iterable[str]) -> tuple[int, str] | None:
    """The first thing wrong with a template, as (line, what); None where it is good."""
    names = set(known)
    for match in Template.pattern.finditer(text):  # type: ignore[attr-defined]
        line = text.count("\n", 0, match.start()) + 1
        if match["invalid"] is not None:
            return line, "expected a name such as ${system.hostname}; $${ stands for ${ itself"
        if match["braced"] is not None and match["braced"] not in names:
            near = nearest(match["braced"], difflib.get_close_matches(match["braced"], names, 1))
            return line, f"unknown value ${{{match['braced']}}}{near or KINDS}"
    return None


def fill(text: str, values: Mapping[str, str]) -> str:
    """The text with the values in their places; it was checked."""
    return Template(text).substitute(values)
