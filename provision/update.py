"""`update` of an installed machine to the newest packages, and `rollback` to what it was before."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from provision.apply import apply, follow_earlier, gather_facts, look_for_extras, probe, wanted_packages
from provision.drift import render_extras
from provision.errors import ProvisionError
from provision.facts import Facts
from provision.flow import converge, progress_on, prove, reboot_and_find, stop_first
from provision.host import Host
from provision.machine import Machine
from provision.person import Ask, ask_person
from provision.snapshot import (
    LOOK,
    NEWER,
    ROLLED_BACK,
    arm,
    downgrade,
    finish,
    go_back,
    has_snapshots,
    note_packages,
    take_snapshot,
    upgrade,
)
from provision.steps import Step
from provision.system import check_root

MOST_SHOWN = 40  # packages by name
LISTS_DEADLINE_S = 300


@dataclass(frozen=True)
class Past:
    """What an installed machine knows of its last update."""

    title: str  # of the boot entry of the snapshot; "" where there is none
    number: str  # of the snapshot, as the entry has it
    root: str  # number of the subvolume that it runs from
    day: str  # of the packages before the update, as 2026/11/23
    updating: str  # day of an update that was not finished
    now: dict[str, str]  # package → version
    then: dict[str, str]


def parse_past(text: str) -> Past:
    words, _, lists = text.partition("@now\n")
    said = {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in words.splitlines()}
    now, marker, then = lists.partition("@then\n")
    if not marker or not {"title", "number", "root", "day", "updating"} <= said.keys():
        raise ProvisionError("The answer about the last update is incomplete.", "Run the command again.")

    def packages(text: str) -> dict[str, str]:
        return {name: version for name, _, version in (line.partition(" ") for line in text.splitlines())}

    return Past(**{key: said[key] for key in ("title", "number", "root", "day", "updating")}, now=packages(now), then=packages(then))  # fmt: skip


def look_at_past(host: Host) -> Past:
    return parse_past(host.look(f"set +eo pipefail\n{LOOK}").stdout)


def update_machine(
    machine: Machine,
    host: Host,
    pins: Path,
    console: Console,
    ask: Ask = ask_person,
    *,
    sweep: bool = False,
    restart: bool = False,
) -> Host:
    """All packages at their newest, and whatever follows from it; the Host of the system that was verified.

    Restarts where kernel or driver changed, or with `restart`. Raises ProvisionError, with what to type, where it broke off.
    """
    facts = ready(machine, host, console)
    check_root(machine, facts)
    past = look_at_past(host)
    if past.updating:
        console.print(f"The update of {past.updating} was not finished: going on with it.")
    packages = wanted_packages(machine, facts)
    if past.updating or look_for_newer(machine, host, console):
        first = take_snapshot(machine) if has_snapshots(machine) else note_packages()
        do([first, upgrade(machine, packages)], "update", machine, host, console)
        after = look_at_past(host)
        console.print(escape(render_changes(after.then, after.now)), highlight=False, soft_wrap=True)
    else:  # without a new snapshot: the one of the last update that changed something is worth more
        console.print("Every package is the newest already.")
    facts = converge(machine, gather_facts(host), host, console, lambda: None)
    if facts.reboot or restart:
        console.print("; ".join(facts.reboot))
        if has_snapshots(machine) and look_at_past(host).updating:
            do([arm(machine)], "update", machine, host, console)
        host = reboot_and_find(machine, host, pins, facts, console, ask, sweep=sweep)
        facts = gather_facts(host)
        demand_updated(machine, facts)
    with taken_back_by(machine):
        prove(machine, host, facts, console, "update")
    do([finish(machine)], "update", machine, host, console)
    if text := render_extras(look_for_extras(machine, facts, host)):
        console.print(escape(text), highlight=False, soft_wrap=True)
    return host


def rollback_machine(
    machine: Machine, host: Host, pins: Path, console: Console, ask: Ask = ask_person, *, sweep: bool = False
) -> Host:
    """The system as it was before the last update: its snapshot with its kernels, else the packages of that day."""
    facts = ready(machine, host, console)
    past = look_at_past(host)
    if past.number:
        console.print(escape(f"Going back to: {past.title}."), highlight=False)
        console.print(escape(render_changes(past.now, past.then)), highlight=False, soft_wrap=True)
        do([go_back()], "rollback", machine, host, console)
        elsewhere = past.root != past.number
    elif facts.subvolume.startswith(f"/@snapshots/{ROLLED_BACK}"):
        elsewhere = True  # all is in its place, and only the restart was cut off
    elif past.day:
        console.print(
            f"There is no snapshot. Going back to the packages of {past.day}, from {machine.mirror.archive}."
        )
        do([downgrade(machine.mirror.archive)], "rollback", machine, host, console)
        console.print(
            escape(render_changes(past.now, look_at_past(host).now)), highlight=False, soft_wrap=True
        )
        facts = gather_facts(host)
        elsewhere = bool(facts.reboot)
    else:
        raise ProvisionError(
            f"{machine.name} has no snapshot from before an update, and no note of one: there is nothing to go back to.",
            f"What differs from its machine file: fab -H {machine.name} plan",
        )
    if elsewhere:
        host = reboot_and_find(machine, host, pins, facts, console, ask, sweep=sweep)
    facts = gather_facts(host)
    if facts.subvolume.startswith("/@snapshots/"):
        raise ProvisionError(
            f"{machine.name} came up from {facts.subvolume} again, and not from its system.",
            "On it, what boots: bootctl list; cat /boot/loader/loader.conf",
        )
    prove(machine, host, facts, console, "verify")
    console.print(f"Whether it still is as its file says: fab -H {machine.name} plan", highlight=False)
    return host


def ready(machine: Machine, host: Host, console: Console) -> Facts:
    """The facts of an installed machine at which nobody else is at work. Raises ProvisionError where a run is."""
    if host.system != "installed":
        raise ProvisionError(
            f"{machine.name} is on the install ISO: there is no system to update or to take back.",
            f"fab -H {machine.name} provision",
        )
    facts = gather_facts(host)
    if facts.applying:
        console.print("An earlier call is still at work on the host: following it to its end.")
        follow_earlier(host, progress_on(console, machine))
        facts = gather_facts(host)
    if facts.runs:
        raise ProvisionError(
            f"{', '.join(facts.runs)} is at work, and would not survive it.",
            stop_first(machine, facts),
        )
    return facts


def do(steps: Sequence[Step], task: str, machine: Machine, host: Host, console: Console) -> None:
    """Those of the Steps that are not done. Raises ProvisionError with the one that failed."""
    plan = probe(task, steps, host)
    if plan:
        apply(plan, machine, host, progress_on(console, machine), task=task)


def look_for_newer(machine: Machine, host: Host, console: Console) -> tuple[str, ...]:
    """One exec: lines `NAME OLD -> NEW`. Raises ProvisionError where no mirror answers."""
    said = host.look(f"set +e\n{NEWER}", deadline_s=LISTS_DEADLINE_S).stdout
    if "@failed\n" in said:
        raise ProvisionError(
            f"The lists of packages did not come; nothing was changed:\n{said.partition('@failed')[2].strip()}",
            f"When the mirrors answer: fab -H {machine.name} update",
        )
    newer = tuple(line for line in said.splitlines() if " -> " in line and not line.endswith("[ignored]"))
    if newer:
        console.print(f"{len(newer)} packages have newer versions.")
    return newer


def demand_updated(machine: Machine, facts: Facts) -> None:
    if facts.subvolume.startswith("/@snapshots/"):
        raise ProvisionError(
            f"The updated system of {machine.name} did not come up; the one from before the update runs again.",
            "Why it did not, if it came so far as to say it: journalctl --boot -1\n"
            f"To take the update back: fab -H {machine.name} rollback",
        )


@contextmanager
def taken_back_by(machine: Machine) -> Iterator[None]:
    """What a failed verification is answered with, too."""
    try:
        yield
    except ProvisionError as error:
        back = f"To take the update back: fab -H {machine.name} rollback"
        raise ProvisionError(error.message, "\n".join(filter(None, [error.hint, back]))) from error


def render_changes(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Packages that are of another version, new or gone."""
    lines = [
        f"  {name}  {before.get(name, 'none')} → {after.get(name, 'none')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    if not lines:
        return "No package is of another version."
    more = [f"  and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
    return "\n".join([f"{len(lines)} packages:", *lines[:MOST_SHOWN], *more])
