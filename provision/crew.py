"""One run over several machines, the first of which leads it: it has the checkpoints, the metrics and the log.

All are asked before one is begun, so where one refuses, nothing has happened anywhere. Then every machine has the same
unit (runs.py) with the same script; torchrun waits until all have come. What ends one trainer ends all, their units
start them again, and the leader's newest checkpoint goes to the others: whichever machine was lost, the run goes on
when it is back. The others are silent but for errors, which who follows the run sees with their names before them.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

from provision.errors import ProvisionError
from provision.host import Host
from provision.machine import Machine
from provision.meet import (
    Node,
    choose_nodes,
    listen_script,
    new_token,
    parse_listening,
    parse_ways,
    try_script,
)
from provision.preflight import Seen, look_for_runs, wants_gpu
from provision.runs import Folder, remove_run, start_run, stop_run, unit_of
from provision.system.python import ENVIRONMENT
from provision.units import OnLine, variables
from workload.config import Config

PYTHON = f"{ENVIRONMENT}/bin/python"
LAST_LINES = 20
LAST_OF_OTHERS = 5
ENDING_S = 120  # for the others' units, once the leader's has ended

Say = Callable[[str], object]
Reach = Callable[[str], Host]  # a machine's name → a session to it
T = TypeVar("T")


def reach_nobody(name: str) -> Host:
    """Of a caller who knows one machine only."""
    raise ProvisionError(f"{name} is part of this run, and no way to it is known here.")


def on_all(hosts: Sequence[Host], work: Callable[[Host], T]) -> list[T]:
    """`work` on every machine at once; what came of it, in their order. Of several errors one that has them all."""
    done: dict[Host, T] = {}
    failed: dict[Host, BaseException] = {}

    def at_work(host: Host) -> None:
        try:
            done[host] = work(host)
        except BaseException as error:
            failed[host] = error

    if len(hosts) == 1:
        return [work(hosts[0])]
    # Daemons: Ctrl-C leaves without waiting for what a machine is busy with.
    threads = [threading.Thread(target=at_work, args=(host,), daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [failed[host] for host in hosts if host in failed]
    readable = [error for error in errors if isinstance(error, ProvisionError)]
    if len(readable) > 1:
        hints = dict.fromkeys(error.hint for error in readable if error.hint)
        raise ProvisionError("\n".join(error.message for error in readable), "\n".join(hints))
    if errors:
        raise errors[0]
    return [done[host] for host in hosts]


# Before a run


@dataclass(frozen=True)
class Member:
    """A machine that is to train, and what was seen of it."""

    host: Host
    machine: Machine
    seen: Seen

    @property
    def name(self) -> str:
        return self.host.name

    @property
    def cards(self) -> int:
        """GPUs that it would train on; 0: its processor."""
        return len(self.seen.cards) if wants_gpu(self.machine, self.seen) else 0


def process_arguments(crew: Sequence[Member]) -> list[str]:
    """Of `workload train`: a process a GPU where there are several, here or on the other machines."""
    most = max(member.cards for member in crew)
    return ["--nproc-per-node", "gpu"] if most > 1 or (len(crew) > 1 and most) else []


def demand_alike(crew: Sequence[Member], config: Config) -> None:
    """Raise ProvisionError where these machines cannot train one model together, or cannot share its batch."""
    lead = crew[0]
    for other in crew[1:]:
        home, away = lead.seen.runs.folder, other.seen.runs.folder
        differs = ""
        if home != away:
            differs = f"runs lie in {home.path} on {lead.name} and in {away.path} on {other.name}"
        elif lead.seen.environment != other.seen.environment:
            differs = f"the Python environment of {other.name} is not that of {lead.name}"
        elif bool(lead.cards) != bool(other.cards):
            with_gpu, without = (lead, other) if lead.cards else (other, lead)
            differs = f"{with_gpu.name} trains on a GPU and {without.name} on its processor"
        if differs:
            raise ProvisionError(
                f"{lead.name} and {other.name} cannot train one model together: {differs}. Nothing was started.",
                "Their files must agree in [python], user.name, train.folder and gpu.driver. For a run on each: --each",
            )
    processes = sum(max(1, member.cards) for member in crew)
    fits = max(1, config.train.batch // processes) * processes
    odd = bool(config.train.micro_batch and fits % config.train.micro_batch)
    if config.train.batch != fits:
        raise ProvisionError(
            f"A step's {config.train.batch} sequences cannot be shared evenly by {processes} processes.",
            f"--set train.batch={fits}" + " --set train.micro_batch=0" * odd,
        )


def meet(crew: Sequence[Host]) -> list[Node]:
    """Each machine's place in the run, once all have reached all; see meet.py. Three execs a machine."""
    tokens = {host.name: new_token() for host in crew}

    def listen(host: Host) -> str:
        return host.run(listen_script(PYTHON, tokens[host.name]), as_root=False).stdout

    heard = on_all(crew, listen)
    machines = [
        parse_listening(host.name, tokens[host.name], text) for host, text in zip(crew, heard, strict=True)
    ]

    def attempt(host: Host) -> str:
        others = [other for other in machines if other.name != host.name]
        return host.run(try_script(PYTHON, others), as_root=False).stdout

    try:
        tried = on_all(crew, attempt)
    finally:  # the port where they will meet must be free again
        pids = {machine.name: machine.pid for machine in machines}
        on_all(crew, lambda host: host.run(f"kill {pids[host.name]} 2>/dev/null || true", as_root=False))
    ways = [way for host, text in zip(crew, tried, strict=True) for way in parse_ways(host.name, text)]
    return choose_nodes(machines, ways)


def demand_free(crew: Sequence[Host], run: str) -> None:
    """Raise ProvisionError where one of them trains something else."""
    for host, runs in zip(
        crew, on_all(crew, lambda host: look_for_runs(host, host.wanted.machine)), strict=True
    ):
        for other in runs.active:
            if other != run:
                raise already_training(host, other)


def already_training(host: Host, run: str) -> ProvisionError:
    return ProvisionError(
        f"{host.name} is already training: {run}.",
        f"fab -H {host.name} stop ends it (it saves first); fab -H {host.name} attach follows it; "
        "--share trains beside it.",
    )


# A run


def start_all(crew: Sequence[Host], folder: Folder, run: str, nodes: Sequence[Node], script: str = "") -> str:
    """`start_run` on every machine, the leader last; what it said. Where one fails, the others are as they were.

    `nodes`: none where the run keeps the places that it has.
    """
    places = {node.name: node.render() for node in nodes}
    names = [host.name for host in crew]

    def start(host: Host) -> str:
        user = host.wanted.machine.user.name
        said = start_run(
            host, folder, run, user, script, node=places.get(host.name, ""), hosts=names if nodes else ()
        )
        if said == "missing" and nodes:
            raise ProvisionError(
                f"There is no run {run} on {host.name}.",
                f"fab -H {','.join(names)} train --resume {run} sends it there.",
            )
        return said

    if (
        not nodes
    ):  # one machine, or a run at work on the first: a machine that gives no answer is no reason to end it
        on_all(crew[1:], start)
        return start(crew[0])
    try:
        on_all(crew[1:], start)
        return start(crew[0])
    except ProvisionError as error:
        left = end_all(crew, folder, run, forget=bool(script))
        what = (
            "\n".join(f"It is not known whether it began on {why}" for why in left) or "Nothing is at work."
        )
        raise ProvisionError(f"{error.message}\n{what}", error.hint) from error


def end_all(hosts: Sequence[Host], folder: Folder, run: str, *, forget: bool = False) -> list[str]:
    """End the run on these machines without saving; of each that gave no answer, which it is and why.

    `forget`: take it away, too, but from the first, which has its checkpoints if there are any.
    """
    left = []
    for host in hosts:
        try:
            stop_run(host, folder, run, now=True)
            if forget and (host is not hosts[0] or not has_checkpoints(host, folder, run)):
                remove_run(host, folder, run)
        except ProvisionError as error:
            left.append(f"{host.name}: {error.message}")
    return left


def has_checkpoints(host: Host, folder: Folder, run: str) -> bool:
    script = variables(run=folder.run(run)) + 'ls "$run"/checkpoints/step-*/manifest.json 2>/dev/null || true'
    return bool(host.run(script, as_root=False).stdout.strip())


class Other(threading.Thread):
    """Follows one of the other machines, whose lines are errors: printed with its name, and kept for the end.

    Where its part of the run fails for good, the leader would wait for it: that is ended over a session of its own.
    """

    def __init__(
        self, host: Host, lead: Host, folder: Folder, run: str, on_line: OnLine, *, begun: bool
    ) -> None:
        super().__init__(daemon=True)
        self.host, self.lead, self.folder, self.run_id, self.on_line = host, lead, folder, run, on_line
        self.begun = begun  # just now: all of its log is new
        self.last: deque[str] = deque(maxlen=LAST_OF_OTHERS)
        self.code: int | None = None
        self.over = False  # the leader has ended, or nobody follows it any more

    def line(self, text: str) -> None:
        self.last.append(text)
        self.on_line(f"{self.host.name} | {text}")

    def run(self) -> None:
        try:
            self.watch()
        except ProvisionError:
            pass
        except Exception:  # a session that is closed under it, when a person leaves
            if not self.over:
                raise

    def watch(self) -> None:
        path = self.folder.run(self.run_id)
        self.code = self.host.follow(
            path / "log",
            unit_of(self.run_id),
            on_line=self.line,
            deadline_s=None,
            offset=0 if self.begun else last_lines_offset(self.host, path, lines=0),
            as_root=False,
        )
        if self.code and not self.over:
            with Host(self.lead.wanted) as session:
                stop_run(session, self.folder, self.run_id, now=True)

    def describe(self) -> str:
        how = "is not known to have ended" if self.code is None else f"ended with status {self.code}"
        return (
            f"{self.host.name} {how}"
            + (":\n" if self.last else "")
            + "\n".join(f"  {text}" for text in self.last)
        )


def follow_run(
    host: Host,
    folder: Folder,
    run: str,
    *,
    on_line: OnLine,
    say: Say,
    others: Sequence[Host] = (),
    begun: bool = False,
) -> str:
    """Hand out the log from its last lines on, to the end of the run; of its other machines what they say.

    `begun`: just now.
    """
    path = folder.run(run)
    last: deque[str] = deque(maxlen=LAST_LINES)

    def line(text: str) -> None:
        last.append(text)
        on_line(text)

    watchers = [Other(other, host, folder, run, on_line, begun=begun) for other in others]
    for watcher in watchers:
        watcher.start()
    try:
        code = host.follow(
            path / "log",
            unit_of(run),
            on_line=line,
            deadline_s=None,
            offset=last_lines_offset(host, path),
            as_root=False,
        )
        for watcher in watchers:
            watcher.over = True
            watcher.join(0 if code else ENDING_S)
    except KeyboardInterrupt:
        for watcher in watchers:
            watcher.over = True
        where = ", ".join(each.name for each in (host, *others))
        say(
            f"\n{run} goes on training on {where}. fab -H {host.name} attach follows it again;\n"
            f"fab -H {host.name} stop ends it (it saves first)."
        )
        raise
    if code:
        end_others(others, folder, run)
        told = [watcher.describe() for watcher in watchers if watcher.code or watcher.last]
        raise ProvisionError(
            f"{run} on {host.name} failed with status {code}:\n"
            + "\n".join([*(f"  {text}" for text in last), *told]),
            f"The whole log: fab -H {host.name} logs --run {run} --lines 1000; "
            f"once the reason is gone: fab -H {host.name} resume --run {run}",
        )
    for watcher in watchers:
        if watcher.code != 0:
            say(watcher.describe())
    return run


def end_others(others: Sequence[Host], folder: Folder, run: str) -> None:
    """Those that would wait for a leader who has ended. Over sessions of their own: theirs are followed on."""
    for other in others:
        with suppress(ProvisionError), Host(other.wanted) as session:
            stop_run(session, folder, run, now=True)


def last_lines_offset(host: Host, folder: PurePosixPath, lines: int = LAST_LINES) -> int:
    """Where the last lines of a run's log begin, in bytes. Raises ProvisionError where there is no such run."""
    script = variables(log=folder / "log", lines=lines) + (
        '[ -r "$log" ] || exit 3\n'
        'size=$(stat -c %s -- "$log")\n'
        'kept=0; [ "$lines" = 0 ] || kept=$(head -c "$size" -- "$log" | tail -n "$lines" | wc -c)\n'
        "echo $((size - kept))"
    )
    result = host.run(script, as_root=False, check=False)
    if result.code:
        raise no_such_run(host, folder.name)
    return int(result.stdout)


def no_such_run(host: Host, run: str) -> ProvisionError:
    return ProvisionError(f"There is no run {run} on {host.name}.", f"fab -H {host.name} runs")
