"""Every fault that `verify` knows, with what to do: `python -m provision.remedies` prints the table as Markdown."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from provision.checks import Check
from provision.history import AS_BEFORE, REMEDY_SLOWER
from provision.long_checks import long_checks
from provision.machine import load_stranger
from provision.verify import checks


def every_check() -> list[Check]:
    """Of machines with cards and without, in the order in which they are asked."""
    stranger = load_stranger("machine", Path("/nonexistent"))
    machine = replace(stranger, disk=replace(stranger.disk, serial="SERIAL"))
    source = PurePosixPath("/")
    listed = [*checks(machine, True), *long_checks(True, source), *long_checks(False, source)]
    found = {check.name: check for check in listed}
    return [*found.values(), Check(AS_BEFORE, "", REMEDY_SLOWER)]


def rows(found: Sequence[Check]) -> Iterator[tuple[str, str, str]]:
    """(check, what is seen as a pattern, "" for all else, what to do)."""
    for check in found:
        for pattern, remedy in check.causes:
            yield check.name, pattern.removeprefix("(?i)").replace(r"\b", "").replace("\\", ""), remedy
        yield check.name, "", check.remedy


def render_remedies(found: Sequence[Check]) -> str:
    lines = ["| check | what it sees | what to do |", "|---|---|---|"]
    for name, pattern, remedy in rows(found):
        seen = f"`{pattern}`" if pattern else "anything else"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (name, seen, remedy)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render_remedies(every_check()), end="")
