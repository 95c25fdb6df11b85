"""Check and Outcome: what must hold on a machine, asked in one exec, and what to do where it does not. Pure: text in, text out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from shlex import quote

from provision.errors import ProvisionError
from provision.steps import prelude


@dataclass(frozen=True)
class Check:
    """`script` (bash) prints what it saw; exit 0 means good.

    `remedy` is what to do otherwise. Where there is more than one cause, `causes` holds (pattern, remedy): the first
    whose pattern is found in what was seen.
    """

    name: str
    script: str
    remedy: str
    causes: tuple[tuple[str, str], ...] = ()

    def remedy_for(self, seen: str) -> str:
        return next((remedy for pattern, remedy in self.causes if re.search(pattern, seen)), self.remedy)


@dataclass(frozen=True)
class Outcome:
    """What was seen; the check's remedy is the one for that."""

    check: Check
    good: bool
    seen: str


def render_checks(wanted: Sequence[Check]) -> str:
    """One script that runs all checks; `parse_checks` reads its output."""
    lines = [prelude("")]
    for index, check in enumerate(wanted):
        script = f"timeout 600 bash --norc --noprofile -uo pipefail -c {quote(check.script)} < /dev/null 2>&1"
        lines.append(f"if seen=$({script}); then good=yes; else good=no; fi")
        lines.append(f"printf '%s %s %s\\n' {index} $good \"$(tr '\\n' ' ' <<< \"$seen\")\"")
    return "\n".join(lines) + "\n"


def parse_checks(wanted: Sequence[Check], text: str) -> list[Outcome]:
    # Not splitlines(): a kernel's log may hold any of the characters that it takes for an end of line.
    answers = [line.split(" ", 2) for line in text.removesuffix("\n").split("\n")]
    if len(answers) != len(wanted):
        raise ProvisionError("The answer of the verification is incomplete.", "Run the command again.")
    found = []
    for number, good, seen in answers:
        check, seen = wanted[int(number)], seen.strip()
        found.append(Outcome(replace(check, remedy=check.remedy_for(seen)), good == "yes", seen))
    return found
