"""The generated parts of the pages: `python -m provision.schema` writes them anew, with the schema.

In a README.md such a part stands between two comments; what is around it is written by people:

    <!-- generated: settings disk -->     the table of [disk], and for sections whose entries have names their example
    <!-- generated: remedies -->          the table of `python -m provision.remedies`
    <!-- end -->
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from provision.errors import ProvisionError
from provision.layers import locate_keys, render_value
from provision.machine import PACKAGED_DEFAULTS, Named, Setting, named_sections, settings
from provision.remedies import every_check, render_remedies
from provision.rules import Between, Rule
from provision.schema import CHOICE, comment_of, named_examples, plain, read_comments
from provision.secrets import Secret

PROJECT = PACKAGED_DEFAULTS.parent.parent
PAGES = (PROJECT / "machines" / "README.md", PROJECT / "provision" / "README.md")
PART = re.compile(r"(?P<begin><!-- generated: (?P<name>[a-z ]+) -->\n).*?(?P<end><!-- end -->)", re.S)


def render_parts(defaults: str) -> dict[str, str]:
    """Every part by its name; `defaults` is the text of machines/defaults.toml."""
    values, meanings = tomllib.loads(defaults), read_comments(defaults)
    parts = {"remedies": render_remedies(every_check())}
    for section, known in settings().items():
        told = {key: meanings.get((section, key), "") for key in known}
        parts[f"settings {section}"] = render_settings(known, values[section], told)
    examples = named_examples(defaults)
    for section, thing in named_sections().items():
        parts[f"settings {section}"] = render_named(thing, examples[section])
    return parts


def render_page(text: str, parts: Mapping[str, str], where: Path) -> str:
    """The page with its generated parts as they are now. ProvisionError where it asks for one that does not exist."""

    def part(found: re.Match[str]) -> str:
        if found["name"] not in parts:
            raise ProvisionError(f"{where}: there is no generated part '{found['name']}'.")
        return f"{found['begin']}\n{parts[found['name']]}\n{found['end']}"

    return PART.sub(part, text)


def render_settings(
    known: Mapping[str, Setting], defaults: Mapping[str, Any], told: Mapping[str, str]
) -> str:
    """A table with a row for each setting; one whose default is None must be given."""
    lines = ["| setting | may be | default | meaning |", "|---|---|---|---|"]
    for key, setting in known.items():
        default = "none: it is required" if defaults[key] is None else f"`{render_value(defaults[key])}`"
        lines.append(f"| `{key}` | {cell(may_be(setting))} | {default} | {cell(told.get(key, ''))} |")
    return "\n".join(lines) + "\n"


def render_named(thing: Named, example: str) -> str:
    """What the section is for, what its names may be, an example, and where an entry is a table its settings."""
    comments = read_comments(example)
    about = next(text for keys, text in comments.items() if text)
    about = f"{about[0].upper()}{about[1:].rstrip('.')}."
    names = f"Names: {thing.name.meaning}"
    parts = [f"{cell(about)} {cell(names)}\n", f"```toml\n{bare(example)}```\n"]
    if isinstance(thing.each, Setting):
        parts.append(f"Each value: {cell(may_be(thing.each))}.\n")
    else:
        fields = thing.kind.__dataclass_fields__
        defaults = {key: plain(fields[key].default) for key in thing.each}
        told = {keys[-1]: text for keys, text in comments.items()}
        parts.append(render_settings(thing.each, defaults, told))
    return "\n".join(parts)


def may_be(setting: Setting) -> str:
    """What a value may be, in words."""
    rule = setting.rule
    if setting.kind is bool:
        return "true or false"
    if isinstance(rule, Between):
        return f"a whole number, {rule.least} to {rule.greatest}"
    if setting.kind is Secret:
        return "a reference to a secret"
    text = rule.meaning if isinstance(rule, Rule) else "text"
    if isinstance(rule, Rule) and CHOICE.fullmatch(rule.pattern):
        *others, last = rule.pattern.split("|")
        text = f"{', '.join(others)} or {last}"
    return f"a list; each: {text}" if setting.kind == tuple[str, ...] else text


def cell(text: str) -> str:
    """As text of Markdown, in a table or not: outside of code what would be a mark there stands for itself."""
    pieces = re.split(r"(`[^`]*`)", text.replace("|", r"\|"))
    return "".join(piece if piece.startswith("`") else re.sub(r"([*~<])", r"\\\1", piece) for piece in pieces)


def bare(example: str) -> str:
    """TOML without its comments, which are told elsewhere."""
    lines = example.split("\n")
    for number in set(locate_keys(example).values()):
        line = lines[number - 1]
        if comment := comment_of(line):
            lines[number - 1] = line[: line.rindex(f"# {comment}")].rstrip()
    return "\n".join(lines)


def save_pages() -> None:
    parts = render_parts(PACKAGED_DEFAULTS.read_text())
    for path in PAGES:
        path.write_text(render_page(path.read_text(), parts, path))
