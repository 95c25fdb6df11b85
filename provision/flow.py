"""`provision` from whatever state the host is in to a verified machine: plan, apply, probe again, reboot, go on."""

import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from provision.apply import (
    Progress,
    apply,
    demand_empty,
    follow_earlier,
    gather_facts,
    leave_live,
    plan_for,
    read_host_key,
)
from provision.errors import ProvisionError
from provision.facts import Facts
from provision.host import Host, reconnect_after_reboot
from provision.machine import Machine, state_folder
from provision.pins import pin
from provision.steps import render_plan
from provision.system.disk import find_disk, would_lose
from provision.verify import Outcome, verify

REBOOT_DEADLINE_S = 900  # firmware of large boards trains memory for minutes

Ask = Callable[[str], str]


def ask_person(question: str) -> str:
    """A line typed by a person, "" where nobody sits there."""
    return input(question).strip() if sys.stdin.isatty() else ""


def show_plan(machine: Machine, host: Host, console: Console) -> None:
    """What `provision` would do now, and what it would destroy. Changes nothing."""
    facts = gather_facts(host)
    plan = plan_for(machine, facts, host)
    if loss := would_lose(machine, facts):
        console.print(f"[bold red]This would be lost:[/]\n{escape(loss)}\n")
    console.print(escape(render_plan(plan)), highlight=False, soft_wrap=True)
    if facts.system == "live":
        console.print(
            "\nThen: reboot into the new system, packages and Python environment there, verification."
        )


def provision_machine(
    machine: Machine, host: Host, pins: Path, wipe: str, console: Console, ask: Ask = ask_person
) -> Host:
    """Bring the machine to what its file says, from the live ISO or from an installation of ours.

    Returns the Host of the installed system; raises ProvisionError naming what failed and what to type.
    """
    facts = gather_facts(host)
    if facts.applying:
        console.print("An earlier run is still at work on the host: following it to its end.")
        follow_earlier(host, progress_on(console, machine))
        facts = gather_facts(host)
    if facts.system == "live":
        authorise_wipe(machine, facts, wipe, ask)
        converge(machine, facts, host, console)
        pin(pins, machine.name, read_host_key(host))
        console.print("Rebooting into the new system.")
        leave_live(host)
        host.close()
        with console.status("waiting for the machine") as status:
            host = reconnect_after_reboot(
                machine,
                pins,
                facts.boot_id,
                deadline_s=REBOOT_DEADLINE_S,
                key_files=host.wanted.key_files,
                on_wait=lambda text: status.update(escape(text)),
            )
        console.print(f"Found again at {host.address}, by the host key that it was given.")
        facts = gather_facts(host)
    converge(machine, facts, host, console)
    show_outcomes(
        machine, verify(machine, host, has_gpu=bool(facts.gpus) and machine.gpu.driver != "none"), console
    )
    return host


def authorise_wipe(machine: Machine, facts: Facts, wipe: str, ask: Ask) -> None:
    """Return only where nothing is lost, or where a person gave the serial of the very disk that loses it."""
    serial = find_disk(machine, facts).serial
    if wipe and wipe != serial:
        raise ProvisionError(
            f"--wipe={wipe} is not the disk of machine '{machine.name}', whose serial is {serial}.",
            "Nothing was changed.",
        )
    loss = would_lose(machine, facts)
    if not loss or wipe == serial:
        return
    if ask(f"This would be lost:\n{loss}\nType the disk's serial to wipe it: ") != serial:
        raise ProvisionError(
            f"The disk holds something that is not ours; nothing was changed.\n{loss}",
            f"If all of it may go: fab -H {machine.name} provision --wipe={serial}",
        )


def converge(machine: Machine, facts: Facts, host: Host, console: Console) -> None:
    """Plan, apply, and prove by a second probe that nothing is left to do."""
    plan = plan_for(machine, facts, host)
    console.print(
        escape(render_plan(plan, diffs=facts.system == "installed")), highlight=False, soft_wrap=True
    )
    if not plan:
        return
    console.print()
    progress = progress_on(console, machine)
    apply(plan, machine, host, progress)
    demand_empty(plan_for(machine, gather_facts(host), host))
    console.print(
        f"Probed again: all {len(plan.pending) + plan.done} Steps are as they should be. Log: {progress.log}"
    )


def progress_on(console: Console, machine: Machine) -> Progress:
    """A line for each Step that ends, and on a terminal the Step at work with its last line of output."""
    status = console.status("")
    log = state_folder(machine.name) / f"{datetime.now():%Y%m%d-%H%M%S}-provision.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    current = ""

    def begin(name: str) -> None:
        nonlocal current
        current = name
        status.start()
        status.update(escape(name))

    def output(line: str) -> None:
        status.update(f"{escape(current)}  [dim]{escape(line[:100])}[/]")

    def end(name: str, seconds: float) -> None:
        status.stop()
        console.print(f"  [green]done[/] {seconds:6.1f} s  {escape(name)}", highlight=False)

    return Progress(begin=begin, output=output, end=end, log=log)


def show_outcomes(machine: Machine, outcomes: list[Outcome], console: Console) -> None:
    table = Table("verified", "", "seen", box=None)
    for outcome in outcomes:
        table.add_row(
            outcome.check.name, "[green]good[/]" if outcome.good else "[red]bad[/]", escape(outcome.seen)
        )
    console.print(table)
    bad = [outcome for outcome in outcomes if not outcome.good]
    if bad:
        raise ProvisionError(
            "\n".join(f"{outcome.check.name}: {outcome.seen}\n  {outcome.check.remedy}" for outcome in bad),
            f"Then: fab -H {machine.name} provision",
        )
