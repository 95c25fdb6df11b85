"""`provision` from whatever state the host is in to a verified machine: plan, apply, probe again, reboot, go on."""

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from provision.apply import (
    Progress,
    apply,
    demand_empty,
    follow_earlier,
    gather_facts,
    look_for_extras,
    plan_for,
    read_host_key,
    read_unlock_key,
    reboot,
    unmount_target,
)
from provision.dial import own_keys
from provision.drift import render_extras
from provision.errors import ProvisionError
from provision.facts import Disk, Facts
from provision.find import BOOT_S, opener_for, reconnect_after_reboot, search_from, tell_on
from provision.host import Host
from provision.machine import Machine, save_local, state_folder
from provision.person import Ask, ask_person
from provision.pins import parse_key, pin, unlock_alias
from provision.steps import Plan, render_plan
from provision.system.base import keys_of
from provision.system.disk import find_disks, losing, would_lose
from provision.system.inventory import describe_disk
from provision.system.layout import layout
from provision.verify import demand_good, render_outcomes, verify


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
        return
    for line in [*obstacles(machine, facts, host, plan), *map("A reboot is due: {}.".format, facts.reboot)]:
        console.print(f"[bold red]{escape(line)}[/]", highlight=False, soft_wrap=True)
    if plan:
        console.print(f"To do it: fab -H {machine.name} provision", highlight=False)
    extras = look_for_extras(machine, facts, host)
    if text := render_extras(extras):
        console.print(f"\n{escape(text)}", highlight=False, soft_wrap=True)


def obstacles(machine: Machine, facts: Facts, host: Host, plan: Plan) -> Iterator[str]:
    """Why `provision` would refuse to apply this plan on an installed machine."""
    for demand in (demand_idle, demand_way_kept):
        try:
            demand(machine, facts, host, plan)
        except ProvisionError as error:
            yield f"provision would refuse: {error.message}"


def provision_machine(
    machine: Machine,
    host: Host,
    pins: Path,
    wipe: str,
    console: Console,
    ask: Ask = ask_person,
    *,
    sweep: bool = False,
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
        demand_way_in(machine, host)
        facts = converge(
            machine, facts, host, console, lambda: authorise_wipe(machine, facts, wipe, ask, console)
        )
        key = read_host_key(host)
        unlock_key = read_unlock_key(host) if machine.disk.unlock == "ssh" else ""
        unmount_target(host)  # before the pin: a machine whose key is pinned has all of it on its disk
        pin(pins, machine.name, key)
        if unlock_key:
            pin(pins, unlock_alias(machine.name), unlock_key)
        host = reboot_and_find(machine, host, pins, facts, console, ask, sweep=sweep)
        facts = gather_facts(host)
    facts = converge(machine, facts, host, console, lambda: None)
    if facts.reboot and not facts.runs:
        console.print("; ".join(facts.reboot))
        host = reboot_and_find(machine, host, pins, facts, console, ask, sweep=sweep)
    prove(machine, host, facts, console, "provision")
    return host


def prove(machine: Machine, host: Host, facts: Facts, console: Console, task: str) -> None:
    """Verify, and show it. Raises ProvisionError where something is bad; `task` is what to type when that is mended."""
    has_gpu = bool(facts.gpus) and machine.gpu.driver != "none"
    outcomes = verify(machine, host, has_gpu)
    console.print(render_outcomes(outcomes))
    demand_good(machine, outcomes, task)


def demand_way_in(machine: Machine, host: Host) -> None:
    """Refuse to make a machine so that this computer could not log in to it afterwards."""
    listed = {parse_key(line) for line in machine.user.authorized_keys}
    if not listed & own_keys(host.login.connection, host.wanted.identities):
        raise ProvisionError(
            "None of this computer's SSH keys is among user.authorized_keys: afterwards it could not log in.\n"
            "Looked at: ssh-agent, ~/.ssh/id_*, ssh.identity, -i and ~/.ssh/config.",
            f"Add one (or its file, such as ~/.ssh/id_ed25519.pub) to the machine file, then: fab -H {machine.name} provision",
        )


def demand_way_kept(machine: Machine, facts: Facts, host: Host, plan: Plan) -> None:
    """Refuse to change who may log in to an installed machine in a way that shuts this computer out."""
    if facts.system == "installed" and any(planned.step.name == keys_of(machine) for planned in plan.pending):
        demand_way_in(machine, host)


def stop_first(machine: Machine, facts: Facts) -> str:
    """What to do about the training runs at work."""
    stop = "; ".join(f"fab -H {machine.name} stop --run {run}" for run in facts.runs)
    return f"Wait for its end, or stop it (it saves first): {stop}"


def demand_idle(machine: Machine, facts: Facts, host: Host, plan: Plan) -> None:
    """Refuse a plan that a training at work might not survive."""
    disturbing = [planned.step.name for planned in plan.pending if planned.step.disturbs_runs]
    if facts.runs and disturbing:
        raise ProvisionError(
            f"{', '.join(facts.runs)} is at work, and would not survive: {', '.join(disturbing)}.",
            stop_first(machine, facts),
        )


def reboot_and_find(
    machine: Machine, host: Host, pins: Path, facts: Facts, console: Console, ask: Ask, *, sweep: bool
) -> Host:
    """Reboot, and wait for the installed system: its pinned key, a new boot id, / on the disk that is the machine's.

    `sweep`: its subnet may be looked through without asking anybody.
    """
    machine = host.wanted.machine  # with the address where it was found
    opener = opener_for(machine)
    console.print("Rebooting.")
    reboot(host)
    host.close()
    with console.status("waiting for the machine") as status:

        def answer(question: str, within_s: float | None = None, /) -> str:
            status.stop()  # or it would draw over what is typed
            try:
                return ask(question, within_s)
            finally:
                status.start()

        search = search_from(machine, host, [mac for _, mac in facts.nics], answer, unasked=sweep)
        found = reconnect_after_reboot(
            machine,
            pins,
            facts.boot_id,
            deadline_s=BOOT_S,
            roots=layout(machine).roots,
            opener=opener,
            search=search,
            key_files=host.wanted.key_files,
            on_wait=tell_on(console, status),
        )
    moved = found.wanted.host != host.wanted.host
    if moved:
        save_local(pins.parent, machine.name, "ssh", "address", found.wanted.host)
    console.print(f"Found again at {found.address}, by the host key that it was given.")
    if moved:
        console.print(f"Its new address is kept in {pins.parent / machine.name}.local.toml.")
    return found


def authorise_wipe(machine: Machine, facts: Facts, wipe: str, ask: Ask, console: Console) -> None:
    """Return only where nothing is lost, or where a person gave the serial of the very disk that loses it."""
    known = [known_as(machine, seen) for seen in find_disks(machine, facts)]
    given = [serial.strip() for serial in wipe.split(",") if serial.strip()]
    if strange := [serial for serial in given if not any(serial in names for names in known)]:
        serials = " and ".join(names[0] for names in known)
        raise ProvisionError(
            f"--wipe={strange[0]} is not the disk of machine '{machine.name}', whose serial is {serials}.",
            "Nothing was changed.",
        )
    if given and not losing(machine, facts):
        console.print(
            "--wipe was not needed: the disk is blank, or carries this machine's layout already, and what is on it is gone on with. "
            "To begin anew, first on the ISO: wipefs --all, on its partitions and then on the disk.",
            soft_wrap=True,
        )
    unasked = [seen for seen in losing(machine, facts) if not set(given) & set(known_as(machine, seen))]
    for seen in list(unasked):
        if ask(
            f"This would be lost:\n{describe_disk(seen)}\nType the disk's serial to wipe it: "
        ) in known_as(machine, seen):
            unasked.remove(seen)
    if unasked:
        serials = ",".join(known_as(machine, seen)[0] for seen in losing(machine, facts))
        raise ProvisionError(
            f"The disk holds something that is not ours; nothing was changed.\n{would_lose(machine, facts)}",
            f"If all of it may go: fab -H {machine.name} provision --wipe={serials}",
        )


def known_as(machine: Machine, seen: Disk) -> list[str]:
    """What a person may call a disk of theirs: its serial, and what the machine file says."""
    return [*filter(None, [seen.serial]), *filter(seen.is_called, machine.disk.system_serials)]


def converge(
    machine: Machine, facts: Facts, host: Host, console: Console, authorise: Callable[[], None]
) -> Facts:
    """Plan, apply, and prove by a second probe that nothing is left to do; the facts as they are then.

    `authorise` is called between, and raises where the plan may not be applied.
    """
    plan = plan_for(machine, facts, host)
    console.print(
        escape(render_plan(plan, diffs=facts.system == "installed")), highlight=False, soft_wrap=True
    )
    authorise()
    if not plan:
        return facts
    demand_way_kept(machine, facts, host, plan)
    demand_idle(machine, facts, host, plan)
    progress = progress_on(console, machine)
    apply(plan, machine, host, progress)
    after = gather_facts(host)
    demand_empty(plan_for(machine, after, host))
    console.print(
        f"Probed again: all {len(plan.pending) + plan.done} Steps are as they should be. Log: {progress.log}",
        soft_wrap=True,  # or the path would be cut in two
    )
    return after


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
        console.print(f"  [green]done[/] {seconds:6.1f} s  {escape(name)}", highlight=False, soft_wrap=True)

    return Progress(begin=begin, output=output, end=end, log=log)
