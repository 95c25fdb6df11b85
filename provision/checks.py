"""Check and Outcome: what must hold on a machine, asked in one exec, and what to do where it does not. Pure: text in, text out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from shlex import quote

from provision.errors import ProvisionError
from provision.programs import program
from provision.steps import prelude
from provision.system.python import ENVIRONMENT

ANSWER = "@@check"  # begins the line of a check that has ended
ASKED = "@@asked"  # begins the line of one that begins
SCRATCH = (
    "scratch=$(mktemp -d)\ntrap 'rm -rf \"$scratch\"' EXIT\n"
    'export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton"\n'
)


@dataclass(frozen=True)
class Check:
    """`script` (bash) prints what it saw; exit 0 means good. Its lines `figure NAME NUMBER` are what it measured.

    `remedy` is what to do otherwise. Where there is more than one cause, `causes` holds (pattern, remedy): the first
    whose pattern is found in what was seen. One that is not done after `limit_s` seconds is ended, and not good.
    """

    name: str
    script: str
    remedy: str
    causes: tuple[tuple[str, str], ...] = ()
    limit_s: int = 600

    def remedy_for(self, seen: str) -> str:
        return next((remedy for pattern, remedy in self.causes if re.search(pattern, seen)), self.remedy)


@dataclass(frozen=True)
class Outcome:
    """What was seen; the check's remedy is the one for that. `figures`: by name, the unit in it."""

    check: Check
    good: bool
    seen: str
    figures: Mapping[str, float] = field(default_factory=dict)


def run_program(name: str, *arguments: str, warnings: str = "ignore") -> str:
    """Bash that runs one of provision/programs in the machine's environment; `arguments` are words of bash.

    Of what it says on stderr only the end says anything.
    """
    call = f"{ENVIRONMENT}/bin/python -W {warnings} -c {quote(program(name))} {' '.join(arguments)}"
    return (
        f'{SCRATCH}{call.rstrip()} > "$scratch/said" 2> "$scratch/errors" || {{\n'
        '  cat "$scratch/said"\n  tail -n 3 "$scratch/errors"\n  exit 1\n}\ncat "$scratch/said"'
    )


def render_checks(wanted: Sequence[Check]) -> str:
    """One script that runs all checks; `parse_checks` reads its output. What a check says to $TELL_FD comes between."""
    # A tab for the end of a line: the one control character that may be anywhere in a log that is followed.
    flat = "tr '\\t\\n' ' \\t'"
    lines = [prelude(""), "exec 3>&1", "export TELL_FD=3"]
    for index, check in enumerate(wanted):
        script = f"timeout -k 5 {check.limit_s} bash --norc --noprofile -uo pipefail -c {quote(check.script)} < /dev/null 2>&1"
        lines.append(f"echo {ASKED} {quote(check.name)}")
        lines.append(f"if seen=$({script}); then good=yes; else good=no code=$?; fi")
        late = f" was not done after {check.limit_s} s"
        lines.append(f'[[ $good == yes || $code != 124 ]] || seen+="{late}"')
        lines.append(f'printf \'{ANSWER} %s %s %s\\n\' {index} $good "$({flat} <<< "$seen")"')
    return "\n".join(lines) + "\n"


def parse_checks(wanted: Sequence[Check], text: str) -> list[Outcome]:
    """The outcomes, in order. Raises ProvisionError where one is missing."""
    # Not splitlines(): a kernel's log may hold any of the characters that it takes for an end of line.
    found = [outcome for line in text.split("\n") for outcome in parse_answer(wanted, line)]
    if len(found) != len(wanted):
        raise ProvisionError("The answer of the verification is incomplete.", "Run the command again.")
    return found


def parse_answer(wanted: Sequence[Check], line: str) -> Iterator[Outcome]:
    """The outcome that a line of the script's output tells; none for every other line."""
    marker, _, rest = line.partition(" ")
    if marker != ANSWER:
        return
    number, good, seen = rest.split(" ", 2)
    check = wanted[int(number)]
    said, figures = list[str](), dict[str, float]()
    for part in seen.split("\t"):
        match part.split(" "):
            case ["figure", name, value]:
                figures[name] = float(value)
            case _:
                said.append(part.strip())
    text = " ".join(filter(None, said))
    yield Outcome(replace(check, remedy=check.remedy_for(text)), good == "yes", text, figures)
