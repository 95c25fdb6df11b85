"""The report of `python -m tests.faults`, as Markdown."""

from collections.abc import Mapping
from typing import Any

from tests.faults.compare import EXCLUDED
from tests.faults.cuts import STAGES, never_hit

HEAD = """\
# Cuts in every Step

Written by `python -m tests.faults {command}`; not by hand. A rehearsed machine (emulated), blank disk, live system, both
stages. *power*: QEMU is killed, the machine booted again, `fab provision` typed again. *process*: `kill -9` of `fab`,
and the same command again. *connection*: away for 0 to 50 s, all within one run of `fab`. A watcher in the machine
freezes the unit at work when a Step has begun, so it is known which Step was cut. What is compared at the end: packages
and why they are there, files below /etc, /boot, /home, /root, /usr/local and our state with mode, owner and hash, sizes
of all files below /usr and /opt, units and their state, mounts, boot entries, accounts, groups, partitions.
"""


def render(records: Mapping[str, Any], command: str) -> str:
    """`records`: name → Record of tests/faults/__main__.py."""
    lines = [HEAD.format(command=command)]
    lines.append(
        "| kind | cuts made / planned | in the Step aimed at | Steps cut / at work without a fault | runs of fab | boots "
        "| minutes | installed | differences | password found |"
    )
    lines.append("|" + "---|" * 10)
    for name, record in records.items():
        outcome = record.outcome
        hits = outcome.hits
        steps = sum(len(records["reference"].outcome.steps[stage]) for stage in STAGES)
        cut = len({(hit.cut.stage, hit.during) for hit in hits if hit.during and not hit.cut.line})
        lines.append(
            f"| {name} | {len(hits)} / {len(record.cuts)} | {sum(hit.on_target for hit in hits)} | {cut} / {steps} "
            f"| {outcome.runs} | {outcome.boots} | {outcome.seconds / 60:.1f} | {'no' if record.error else 'yes'} "
            f"| {'-' if name == 'reference' else len(record.different)} | {len(outcome.leaks)} |"
        )
    lines.append("")
    for name, record in records.items():
        missed = never_hit(record.cuts, record.outcome.hits)
        if record.cuts:
            lines.append(
                f"{name}, Steps aimed at and never cut: {', '.join(step for _, step in missed) or 'none'}."
            )
        lines += [f"{name}: **{record.error}**"] if record.error else []
        lines += [f"- {name}, different: `{difference}`" for difference in record.different]
        lines += [f"- {name}, the password can be read: {leak}" for leak in record.outcome.leaks]
    samples = sum(record.outcome.samples for record in records.values())
    lines += [
        "",
        f"Searched for the password: every log on this computer and the machine's console, {samples} samples of all command "
        "lines and environments in the machine, its files, journal, unit properties and processes, and its disk byte by byte.",
        "",
        "Left out of the comparison, as two undisturbed machines differ in it too:",
        *(f"- `{pattern}`: {why}" for _, pattern, why in EXCLUDED),
        "",
    ]
    return "\n".join(lines)
