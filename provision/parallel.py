"""`fab -H a,b,c TASK`: the same task on several machines at once.

Fabric's own executor takes one machine after the other, and one that fails keeps the rest from starting. This one
gives each machine a thread, a log file and, on a terminal, a live line; with several tasks, each machine goes on to
the next by itself. With one machine it is Fabric's.

`train` is for all of them together: one run over the machines, which the first one leads. It is done once, when every
machine is through with the tasks before it; `--each` makes it a run on each.

Nobody can be asked anything by several machines at once: what would be a question is an error that names the option.
"""

import io
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import fabric
from fabric.connection import derive_shorthand
from fabric.tasks import ConnectionCall
from invoke.exceptions import Exit
from rich.console import Console, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.status import Status
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

from provision.crew import reach_nobody
from provision.dial import Confirm
from provision.errors import ProvisionError
from provision.host import Host
from provision.machine import load_machine, machines_folder, state_folder
from provision.person import Ask, ask_nobody, ask_person, confirm_person

# Options that are about one machine only; --name of inspect, too.
OF_ONE_MACHINE = ("fingerprint", "address", "resume")
TOGETHER = "train"  # the task that several machines do as one, unless it is to be --each
# Tasks whose output is what they are for: shown whole on a terminal too.
SHOWN = ("plan", "disks", "inspect", "runs", "logs", "sample", "report")
LOG_WIDTH = 160  # columns, where no terminal sets them


@dataclass(frozen=True)
class Screen:
    """Where the output of one machine goes, and who answers its questions (`confirm` None: nobody can).

    `beside`: the other machines that the person named. `reach`: a session to a machine, by its name.
    """

    console: Console
    say: Callable[[str], None] = print
    ask: Ask = ask_person
    confirm: Confirm | None = confirm_person
    beside: tuple[str, ...] = ()
    reach: Callable[[str], Host] = reach_nobody


ALONE = Screen(Console())
CURRENT: ContextVar[Screen] = ContextVar("screen", default=ALONE)


def screen() -> Screen:
    """The screen of the machine that the calling thread works for."""
    return CURRENT.get()


class Stopped(BaseException):
    """Raised in a machine's thread at its next line of output, once a person has pressed Ctrl-C."""


@dataclass
class Row:
    """One machine's line: what it is at, how it ended. `error`: None while at work, "" when it went well."""

    name: str
    log: Path
    at: str = ""
    last: str = ""
    since: float = field(default_factory=time.monotonic)
    took_s: float | None = None
    error: str | None = None
    said: list[str] = field(default_factory=list)

    def elapsed(self) -> str:
        seconds = round(time.monotonic() - self.since if self.took_s is None else self.took_s)
        return f"{seconds // 60}:{seconds % 60:02}"


class Board:
    """What is seen of all machines: lines with the machine's name before them, or a live table on a terminal."""

    def __init__(self, rows: Sequence[Row], console: Console, *, whole: bool) -> None:
        self.rows = rows
        self.console = console
        self.whole = whole  # a machine's output is shown when it has ended, on a terminal too
        self.width = max(len(row.name) for row in rows)
        self.lock = threading.Lock()
        self.stopped = False
        for row in rows:
            row.log.parent.mkdir(parents=True, exist_ok=True)

    def line(self, row: Row, text: str) -> None:
        """One line of a machine: to its log, and to the screen or its row."""
        with self.lock:
            if self.stopped:
                raise Stopped
            with row.log.open("a") as log:
                log.write(text + "\n")
            if self.whole:
                row.said.append(text)
            row.last = text.strip() or row.last
            if not self.console.is_terminal:
                print(f"{row.name:{self.width}} | {text}".rstrip(), file=self.console.file, flush=True)

    def at(self, row: Row, text: str) -> None:
        """What a machine is at, and behind two blanks its last line of output."""
        with self.lock:
            if self.stopped:
                raise Stopped
            row.at, _, row.last = text.partition("  ")

    def ended(self, row: Row, error: str) -> None:
        """How a machine's task ended: "" or the whole error."""
        for text in error.splitlines():
            self.line(row, text)
        with self.lock:
            row.took_s = time.monotonic() - row.since
            row.at, row.error = "", error
            row.last = error.partition("\n")[0] or row.last
            if self.console.is_terminal and (self.whole or error):
                said = row.said if self.whole else error.splitlines()
                self.console.print(Rule(row.name, align="left"))
                self.console.print("\n".join(said), markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """From now on no thread writes anything: each ends at its next line."""
        with self.lock:
            self.stopped = True

    def table(self) -> Table:
        """The live lines."""
        table = Table("machine", "at work", box=None, expand=True)
        table.add_column("last line", ratio=1)
        table.add_column("elapsed", justify="right")
        for column in table.columns:
            column.no_wrap = True
        for row in self.rows:
            ended = {None: row.at, "": "[green]done[/]"}.get(row.error, "[red]failed[/]")
            at = Text(row.at) if row.error is None else Text.from_markup(ended)
            table.add_row(Text(row.name), at, Text(row.last, style="dim"), row.elapsed())
        return table

    def summary(self) -> Table:
        """How every machine ended."""
        table = Table("machine", "", "time", "error", "log", box=None)
        states = {None: "[yellow]not watched any more[/]", "": "[green]ok[/]"}
        for row in self.rows:
            first = (row.error or "").strip().partition("\n")[0].removeprefix("error: ")
            state = states.get(row.error, "[red]failed[/]")
            table.add_row(Text(row.name), state, row.elapsed(), Text(first), Text(str(row.log)))
        return table


class Lines(io.TextIOBase):
    """A text file whose whole lines go to a machine's row."""

    def __init__(self, board: Board, row: Row) -> None:
        self.board, self.row, self.rest = board, row, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.board.line(self.row, line.rstrip())
        return len(text)


class RowStatus(Status):
    """A console's status without a spinner of its own: it is the machine's row that says it."""

    def __init__(self, board: Board, row: Row, status: RenderableType) -> None:
        self.board, self.row = board, row
        self.update(status)

    def update(
        self,
        status: RenderableType | None = None,
        *,
        spinner: str | None = None,
        spinner_style: StyleType | None = None,
        speed: float | None = None,
    ) -> None:
        self.board.at(self.row, Text.from_markup(str(status or "")).plain)

    def start(self) -> None:
        """It is shown all the time."""

    def stop(self) -> None:
        self.row.at = ""


class RowConsole(Console):
    """A console for one of several machines."""

    def __init__(self, board: Board, row: Row) -> None:
        super().__init__(file=Lines(board, row), width=LOG_WIDTH, force_terminal=False, color_system=None)  # type: ignore[arg-type]
        self.board, self.row = board, row

    def status(self, status: RenderableType, **options: Any) -> Status:
        return RowStatus(self.board, self.row, status)


def screen_of(board: Board, row: Row) -> Screen:
    console = RowConsole(board, row)
    beside = tuple(other.name for other in board.rows if other is not row)
    return Screen(console, lambda text: print(text, file=console.file), ask_nobody, None, beside)


def run_all(board: Board, work: Mapping[str, Callable[[], object]]) -> int:
    """Do every machine's work in a thread of its own; the exit code: 0, 1 if any failed, 130 after Ctrl-C.

    The threads are daemons: Ctrl-C leaves without waiting for what a host is busy with.
    """
    ended: SimpleQueue[str] = SimpleQueue()
    for row in board.rows:
        run = (board, row, work[row.name], ended)
        threading.Thread(target=run_one, args=run, name=row.name, daemon=True).start()
    live = Live(get_renderable=board.table, console=board.console, transient=True)
    try:
        if board.console.is_terminal:
            with live:
                wait_all(board, ended)
        else:
            wait_all(board, ended)
    except KeyboardInterrupt:
        board.stop()
    board.console.print()
    board.console.print(board.summary())
    if board.stopped:
        board.console.print(
            "\nStopped watching. What was begun on the hosts goes on; the same command follows it again."
        )
        return 130
    return int(any(row.error for row in board.rows))


def wait_all(board: Board, ended: "SimpleQueue[str]") -> None:
    for _ in board.rows:
        ended.get()


def run_one(board: Board, row: Row, work: Callable[[], object], ended: "SimpleQueue[str]") -> None:
    """One machine's thread. Whatever is raised here ends this machine only."""
    try:
        CURRENT.set(screen_of(board, row))
        try:
            work()
        except Exit as error:
            board.ended(row, (error.message or f"error: exit {error.code}").strip() if error.code else "")
        except Exception as error:
            for line in traceback.format_exc().splitlines():
                board.line(row, line)
            board.ended(row, f"error: {type(error).__name__}: {error}")
        else:
            board.ended(row, "")
    except Stopped:
        pass
    finally:
        ended.put(row.name)


# --- fab's command line ---------------------------------------------------------------------------------------


def unique_hosts(hosts: Iterable[str]) -> tuple[list[str], list[str]]:
    """(the machines that -H names, each once and in order; those that it names again)."""
    seen: dict[str, str] = {}
    again = []
    for host in (text.strip() for text in hosts):
        if host and seen.setdefault(name_of(host), host) is not host:
            again.append(name_of(host))
    return list(seen.values()), again


def name_of(host: str) -> str:
    return str(derive_shorthand(host)["host"])


def share_wipe(serials: str, disks: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """machine → its own serials out of `--wipe=S1,S2,…`, "" where none is (`disks`: machine → serials of its disks).

    Raises ProvisionError, and so before any machine is touched, for a serial that is not that of exactly one of them.
    """
    given = [serial.strip() for serial in serials.split(",") if serial.strip()]
    for serial in given:
        owners = [name for name, own in disks.items() if serial in own]
        if not owners:
            known = "\n".join(f"  {name}: {', '.join(own)}" for name, own in disks.items())
            raise ProvisionError(
                f"--wipe: {serial} is the disk of none of these machines; nothing was begun.\n{known}",
                "A serial lets that one disk be wiped: --wipe=SERIAL,SERIAL",
            )
        if len(owners) > 1:
            raise ProvisionError(
                f"--wipe: {serial} is the disk of {' and '.join(owners)} by their files; nothing was begun.",
                "Which of them may be wiped cannot be told: name one machine at a time.",
            )
    return {name: ",".join(serial for serial in given if serial in own) for name, own in disks.items()}


def demand_common(options: Mapping[str, object], names: Sequence[str], task: str) -> None:
    """Refuse, for several machines, an option that is about one of them."""
    for option in (*OF_ONE_MACHINE, *(["name"] if task == "inspect" else [])):
        if options.get(option):
            raise ProvisionError(
                f"--{option} says something of one machine, and {len(names)} were named.",
                f"Give it to each by itself: fab -H {names[0]} {task.replace('_', '-')} --{option} …",
            )


def load_serials(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """machine → serials of the disks that its file lets be wiped. A file with errors is left out here: its own task says what is wrong."""
    found = {}
    for name in names:
        try:
            found[name] = load_machine(name, machines_folder()).disk.system_serials
        except ProvisionError:
            continue
    return found


Chains = dict[str, list[tuple[ConnectionCall, fabric.Connection]]]  # machine → its tasks in order


class Executor(fabric.Executor):  # type: ignore[misc]
    """Fabric's, with several machines at once. Set as `fabric.main.program.executor_class` by the fabfile."""

    def normalize_hosts(self, hosts: Sequence[str] | None) -> list[dict[str, str]]:
        return [{"host": host} for host in unique_hosts(hosts or ())[0]]

    def execute(self, *tasks: Any) -> Any:
        named = (self.core[0].args.hosts.value or "").split(",")
        hosts, again = unique_hosts(named)
        if again:
            print(f"Named more than once, done once: {', '.join(dict.fromkeys(again))}", file=sys.stderr)
        if len(hosts) < 2 or self.core.remainder:
            return super().execute(*tasks)
        try:
            calls = self.by_machine(tasks)
        except ProvisionError as error:
            raise Exit(f"\nerror: {error.message}\n{error.hint}", 1) from None
        for together, chains in phases(calls):
            if together:
                run_together(chains)
            else:
                run_apart(chains)
        return {}

    def by_machine(self, tasks: Sequence[Any]) -> Chains:
        """machine → its calls, each with its Connection, the options shared out. Raises ProvisionError."""
        chains: Chains = {}
        for call in self.expand_calls(self.normalize(tasks)):
            self.config.load_collection(self.collection.configuration(call.called_as))
            self.config.load_shell_env()
            chains.setdefault(name_of(call.init_kwargs["host"]), []).append(
                (call, call.make_context(self.config.clone()))
            )
        serials: dict[str, tuple[str, ...]] = {}
        for name, chain in chains.items():
            for call, _ in chain:
                if not is_together(call):
                    demand_common(call.kwargs, list(chains), call.task.name)
                if wipe := call.kwargs.get("wipe"):
                    serials = serials or load_serials(chains)
                    call.kwargs["wipe"] = share_wipe(wipe, serials).get(name, "")
        return chains


def is_together(call: ConnectionCall) -> bool:
    return bool(call.task.name == TOGETHER and not call.kwargs.get("each"))


def phases(calls: Chains) -> Iterator[tuple[bool, Chains]]:
    """What is done one after another: one task together, or a part of the chains that each machine does by itself."""
    done = 0
    for together, part in groupby(next(iter(calls.values())), lambda step: is_together(step[0])):
        count = len(list(part))
        for length in [1] * count if together else [count]:
            yield together, {name: chain[done : done + length] for name, chain in calls.items()}
            done += length


def run_together(calls: Chains) -> None:
    """One task, once, for all the machines, on the first one's connection; it finds the others on its screen."""
    name, *beside = calls
    ((call, context),) = calls[name]
    token = CURRENT.set(replace(screen(), beside=tuple(beside)))
    try:
        call.task(context, *call.args, **call.kwargs)
    finally:
        CURRENT.reset(token)


def run_apart(calls: Chains) -> None:
    """Every machine's part at the same time. Raises Exit when one of them failed."""
    titles = list(dict.fromkeys(call.task.name for chain in calls.values() for call, _ in chain))
    now = f"{datetime.now():%Y%m%d-%H%M%S}-fab-{'-'.join(titles)}.log"
    rows = [Row(name, state_folder(name) / now) for name in calls]
    board = Board(rows, output(), whole=any(title in SHOWN for title in titles))
    if code := run_all(board, {name: chained(chain) for name, chain in calls.items()}):
        raise Exit(code=code)


def chained(chain: Sequence[tuple[ConnectionCall, fabric.Connection]]) -> Callable[[], None]:
    """One machine's tasks in order; the first that fails ends it."""

    def run() -> None:
        for call, context in chain:
            call.task(context, *call.args, **call.kwargs)

    return run


def output() -> Console:
    """Standard output; wide where it is no terminal, so that a line of the summary stays a line."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, LOG_WIDTH))
