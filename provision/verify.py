"""Whether a machine can train: what `provision` asks at its end, in one exec; and all of it, for `fab verify`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from shlex import quote

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from provision.apply import gather_facts
from provision.checks import ASKED, Check, Outcome, parse_checks, render_checks
from provision.errors import ProvisionError
from provision.facts import Facts
from provision.gpu_checks import gpu_checks
from provision.history import Record, compare, entry_of, load_records, save_record, save_text
from provision.host import Host
from provision.long_checks import LOAD_S, long_checks
from provision.machine import Machine
from provision.preflight import demand_installed, look_for_runs
from provision.source import content_hash, package_files
from provision.system.gpu import family
from provision.system_checks import LEARNS, clock_is_right, learns, system_checks
from provision.transfer import human
from provision.verify_page import render_verify_page

__all__ = ["Outcome", "checks", "verify", "verify_machine"]

DEADLINE_S = 1800  # importing torch takes a minute on an emulated processor, and on a busy one ten
LONG_DEADLINE_S = 2 * 3600  # more than all their limits together
UNIT = "metal-verify"
FOLDER = "verify"  # below checkpoints/NAME
PAGE = "index.html"


def checks(machine: Machine, has_gpu: bool) -> list[Check]:
    """What must hold on an installed machine, and is seen in seconds. `has_gpu`: an NVIDIA driver was installed on it."""
    return [*system_checks(machine), *(gpu_checks() if has_gpu else []), learns(has_gpu)]


def verify(machine: Machine, host: Host, has_gpu: bool) -> list[Outcome]:
    """One exec: all quick checks, in order."""
    wanted = checks(machine, has_gpu)
    sent_s = time.time()
    answer = host.look(render_checks(wanted), deadline_s=DEADLINE_S).stdout
    return [judge_clock(outcome, sent_s, time.time()) for outcome in parse_checks(wanted, answer)]


def judge_clock(outcome: Outcome, sent_s: float, received_s: float) -> Outcome:
    """The outcome of the check of the clock by this computer's; any other as it is."""
    clock_s = outcome.figures.get("clock_s")
    if clock_s is None:
        return outcome
    away_s = clock_s - received_s
    told = f"{abs(away_s):.0f} s {'behind' if away_s < 0 else 'ahead of'} this computer's"
    good = outcome.good and clock_is_right(clock_s, sent_s, received_s)
    return replace(outcome, good=good, seen=outcome.seen if good else f"{outcome.seen}, {told}", figures={})


def verify_machine(
    machine: Machine,
    host: Host,
    folder: Path,
    console: Console,
    *,
    quick: bool = False,
    load_s: int = LOAD_S,
    say: Callable[[str], object] = print,
) -> Record:
    """All checks, shown as a table and kept below `folder` as JSON and a page with their history.

    `quick` leaves out what takes minutes; so does a training run at work, and whoever else computes on a card.
    Raises ProvisionError, once all is kept, where something is wrong.
    """
    demand_installed(host)
    began, since = datetime.now(UTC), time.monotonic()
    facts = gather_facts(host)
    has_gpu = bool(facts.gpus) and machine.gpu.driver != "none"
    outcomes = verify(machine, host, has_gpu)
    left_out = why_left_out(facts, outcomes, quick)
    if left_out:
        say(f"Left out: disk speed, training speed, load: {left_out}.")
    else:
        outcomes += verify_long(machine, host, has_gpu, load_s, console, say)
    about = describe(facts)
    earlier, refused = load_records(folder / FOLDER)
    if then := compare(outcomes, about, earlier):
        outcomes.append(then)
    seconds = time.monotonic() - since
    record = Record(machine.name, began, seconds, left_out, about, tuple(map(entry_of, outcomes)))
    path = save_record(folder / FOLDER, record)
    page = folder / FOLDER / PAGE
    save_text(page, render_verify_page([*earlier, record]))
    for text in refused:
        say(f"An earlier record is not counted: {text}")
    console.print(render_outcomes(outcomes))
    say(f"Kept as {path}; with its history in {page.resolve()}")
    demand_good(machine, outcomes, "verify")
    return record


def why_left_out(facts: Facts, outcomes: Sequence[Outcome], quick: bool) -> str:
    """Why the long checks are not run; "" where they are."""
    if quick:
        return "it shall be quick"
    if facts.runs:
        return f"{', '.join(facts.runs)} is at work"
    if any(outcome.figures.get("busy_processes") for outcome in outcomes):
        return "somebody computes on a card; fab runs and nvidia-smi tell who"
    if any(outcome.check.name == LEARNS and not outcome.good for outcome in outcomes):
        return "without a Python environment that works they would say nothing"
    return ""


def verify_long(
    machine: Machine, host: Host, has_gpu: bool, load_s: int, console: Console, say: Callable[[str], object]
) -> list[Outcome]:
    """As a unit that outlives the connection; what is at work is shown."""
    source = send_workload(host, machine)
    wanted = long_checks(has_gpu, source, load_s)
    say(f"Now what takes minutes: {', '.join(check.name for check in wanted)} ({load_s} s).")
    said = list[str]()
    with console.status(wanted[0].name) as status:

        def hear(line: str) -> None:
            if line == f"{ASKED} {wanted[0].name}":
                said.clear()  # of another verification, which was at work and had to end first
            said.append(line)
            if not line.startswith("@@"):
                status.update(escape(line))
            elif line.startswith(ASKED):
                status.update(escape(line.partition(" ")[2]))

        user = machine.user.name
        script = render_checks(wanted)
        code = host.run_unit(UNIT, script, on_line=hear, deadline_s=LONG_DEADLINE_S, user=user)
    if code:
        raise ProvisionError(
            f"The verification ended with status {code}:\n" + "\n".join(said[-5:]),
            f"The same command begins it again: fab -H {machine.name} verify",
        )
    return parse_checks(wanted, "\n".join(said))


def send_workload(host: Host, machine: Machine) -> PurePosixPath:
    """The package as runs get it, where it is not there already; its folder."""
    files = package_files()
    place = look_for_runs(host, machine).folder.source(content_hash(files))
    there = host.look(f"[[ ! -e {quote(str(place))} ]] || echo yes", as_root=False).stdout.strip()
    if not there:
        host.send_tree(files, place, as_root=False)
    return place


def describe(facts: Facts) -> dict[str, str]:
    """What a record says of the machine that it was made on."""
    cards = ", ".join(f"10de:{gpu.device:04x} ({family(gpu.device)})" for gpu in facts.gpus)
    return {
        "kernel": facts.kernel,
        "processor": facts.cpu_model,
        "memory": human(facts.memory_bytes),
        "cards": cards or "none",
    }


def render_outcomes(outcomes: Sequence[Outcome]) -> Table:
    table = Table("verified", "", "seen", box=None)
    for outcome in outcomes:
        verdict = "[green]good[/]" if outcome.good else "[red]bad[/]"
        table.add_row(outcome.check.name, verdict, escape(outcome.seen))
    return table


def demand_good(machine: Machine, outcomes: Sequence[Outcome], task: str) -> None:
    """Raise ProvisionError with what was seen and the remedy of all that is not good."""
    bad = [outcome for outcome in outcomes if not outcome.good]
    if bad:
        raise ProvisionError(
            "\n".join(f"{outcome.check.name}: {outcome.seen}\n  {outcome.check.remedy}" for outcome in bad),
            f"Then: fab -H {machine.name} {task}",
        )
