"""The phases of a rehearsal, each as a person would type it, with its time and its log."""

import hashlib
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from provision.errors import ProvisionError
from provision.machine import Machine, machines_folder
from provision.rehearsal import tools
from provision.rehearsal.bed import DISKS, NAME, Bed
from provision.rehearsal.iso import check_iso
from provision.rehearsal.official import OfficialBed
from provision.rehearsal.vm import Vm

PROJECT = Path(__file__).resolve().parents[2]

# Emulated, a step costs some forty times what it costs outside: few steps of few tokens, over bytes.
TRAINING = {
    "data.tokenizer": "bytes",
    "model.n_layer": "2",
    "model.n_head": "2",
    "model.n_embd": "32",
    "model.n_ctx": "64",
    "train.steps": "20",
    "train.batch": "4",
    "train.micro_batch": "4",
    "train.warmup": "2",
    "train.lr": "1e-2",
    "train.log_every": "5",
    "train.eval_every": "10",
    "train.eval_sequences": "4",
    "train.save_every": "10",
    "train.sample_tokens": "20",
}
PROMPT = "OTHELLO.\n"

# Generous: emulation on a busy computer. A phase that hangs ends all the same.
TRAIN_DEADLINE_S = 2400
FETCH_DEADLINE_S = 900
SAMPLE_DEADLINE_S = 600


@dataclass
class Record:
    """What is remembered between a rehearsal and its resumption: `rehearsal.json` in the machine's folder."""

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase that is done

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.seconds))
        partial.rename(self.path)


def load_record(path: Path, begin: str) -> Record:
    """Raises ProvisionError where there was no rehearsal; `begin` is how to have one."""
    if not path.exists():
        raise ProvisionError("There is no rehearsal to go on with.", f"Begin one: {begin}")
    return Record(path, json.loads(path.read_text()))


class Rehearsal:
    """One machine on its way: `boot`, then the project's commands. Needs an entered bed."""

    def __init__(self, bed: Bed | OfficialBed, vm: Vm, console: Console, wishes: str = "") -> None:
        self.bed = bed
        self.name = bed.person.name if bed.person else NAME
        self.wishes = wishes  # TOML over the machine's own file
        self.vm = vm
        self.console = console
        self.logs = vm.folder / "logs"
        self.machines = vm.folder / "machines"

    @property
    def environment(self) -> dict[str, str]:
        """What a person sets to talk to this machine; logs of the tasks stay beside ours."""
        return {
            "METAL_MACHINES": str(self.machines),
            "XDG_STATE_HOME": str(self.logs),
            "COLUMNS": str(self.console.width - 2),
        }

    def boot(self, *, cold: bool, seed: Path | None = None) -> None:
        """A blank machine, in the live system; nothing is left of an earlier rehearsal."""
        self.vm.claim()
        for folder in (self.machines, self.logs):
            shutil.rmtree(folder, ignore_errors=True)
        self.bed.write_machine_files(self.vm, machines_folder(), self.wishes)
        self.bed.boot_live(self.vm, cold=cold, seed=seed)

    def boot_again(self) -> None:
        """The machine as it was left. Where its key is pinned its disk is complete, else the medium is chosen."""
        pins = self.machines / "known_hosts"
        installed = pins.exists() and any(
            line.startswith(f"{self.name} ") for line in pins.read_text().splitlines()
        )
        self.bed.write_machine_files(self.vm, machines_folder(), self.wishes)
        self.bed.boot_again(self.vm, "disk" if installed else "medium")

    def provision(self) -> None:
        self.fab("provision", *self.bed.trust, deadline_s=self.bed.provision_deadline_s)

    def train(self) -> None:
        settings = [f"--set={key}={value}" for key, value in TRAINING.items()]
        self.fab("train", "--preset", "demo", *settings, deadline_s=TRAIN_DEADLINE_S)

    def fetch(self) -> None:
        self.fab("fetch-checkpoints", deadline_s=FETCH_DEADLINE_S)
        newest_checkpoint(Path("checkpoints") / NAME)

    def sample(self) -> None:
        checkpoint = newest_checkpoint(Path("checkpoints") / NAME)
        argv = [
            sys.executable,
            "-m",
            "workload",
            "sample",
            str(checkpoint),
            "--prompt",
            PROMPT,
            "--tokens",
            "60",
        ]
        self.run("sample", argv, deadline_s=SAMPLE_DEADLINE_S)

    def fab(self, task: str, *words: str, deadline_s: float) -> None:
        """A task of the fabfile, on this machine. Raises ProvisionError with its last lines where it fails."""
        self.run(task, fab_command(task, *words, name=self.name), deadline_s=deadline_s)

    def run(self, name: str, argv: Sequence[str], *, deadline_s: float) -> None:
        """A command with its output shown as it comes and kept in `logs/NAME.log`; ended if the machine dies."""
        log = self.logs / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.console.print(f"[dim]$ {escape(' '.join(shown(argv)))}[/]", soft_wrap=True, highlight=False)
        process = start(argv, self.environment)
        try:
            with log.open("a", buffering=1) as output:  # by lines, so that it can be watched
                for line in lines_of(process, deadline_s, self.vm.check):
                    output.write(line)
                    self.console.print(f"  {escape(line.rstrip())}", soft_wrap=True, highlight=False)
        finally:
            process.kill()
            status = process.wait()
        if status:
            command = " ".join(shown(argv))
            raise ProvisionError(
                f"`{command}` ended with status {status}:\n{tools.last_lines(log)}", f"All of it: {log}"
            )


def fab_command(task: str, *words: str, name: str = NAME) -> list[str]:
    """argv for a task of this project's fabfile on the rehearsed machine, from any folder."""
    return [
        str(Path(sys.executable).with_name("fab")),
        "--search-root",
        str(PROJECT),
        "-H",
        name,
        task,
        *words,
    ]


def shown(argv: Sequence[str]) -> list[str]:
    """A command as a person would type it in the project's folder."""
    words = [Path(argv[0]).name, *argv[1:]]
    if "--search-root" in words:
        at = words.index("--search-root")
        del words[at : at + 2]
    return [word.replace("\n", "\\n") for word in words]


def start(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        tools.bound(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


def lines_of(process: subprocess.Popen[str], deadline_s: float, check: Callable[[], None]) -> Iterator[str]:
    """The process' output until it ends. `check` is called once a second and may raise; so does the deadline."""
    assert process.stdout
    lines: queue.Queue[str | None] = queue.Queue()
    output = process.stdout

    def read() -> None:
        with output:
            for line in output:
                lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            check()
            if time.monotonic() > deadline:
                raise ProvisionError(f"It did not end within {deadline_s:.0f} s.") from None
            continue
        if line is None:
            process.wait()
            return
        yield line


def newest_checkpoint(folder: Path) -> Path:
    """The last complete checkpoint below a folder, every file of every one compared with its manifest first.

    Raises ProvisionError where there is none, or where a byte differs.
    """
    manifests = sorted(
        folder.rglob("manifest.json"), key=lambda path: (path.stat().st_mtime, path.parent.name)
    )
    for manifest in manifests:
        for name, wanted in json.loads(manifest.read_text())["files"].items():
            file = manifest.parent / name
            if hashlib.sha256(file.read_bytes()).hexdigest() != wanted["sha256"]:
                raise ProvisionError(f"{file} is not what {manifest} says.")
    if not manifests:
        raise ProvisionError(
            f"No complete checkpoint below {folder.resolve()}.", f"Try: fab -H {NAME} fetch-checkpoints"
        )
    return manifests[-1].parent


def rehearse(folder: Path, console: Console, *, resume: bool, cold: bool, keep: bool) -> None:
    """The whole way, then a table of it. Raises ProvisionError naming the phase that failed, and how to go on.

    `resume` goes on after the last phase that was done, on the same disk; `cold` boots from the firmware
    instead of a saved state; `keep` leaves the machine on, until Ctrl-C.
    """
    bed = Bed(folder, on_build=lambda name: console.print(f"  building {name}"))
    again = "python -m provision.rehearsal run --resume"
    tasks = ("provision", "train", "fetch", "sample")
    go(bed, NAME, tasks, again, console, resume=resume, cold=cold, keep=keep)


def rehearse_machine(
    machine: Machine, folder: Path, console: Console, *, resume: bool, cold: bool, keep: bool, iso: str = ""
) -> None:
    """`provision` of a person's own machine, as its file has it, in a virtual machine with such disks; as `rehearse`.

    `iso`: the official ISO, which is booted as it is once its signature was checked; packages come from its mirrors.
    """
    again = f"fab rehearse {machine.name} --resume"
    bed: Bed | OfficialBed
    if iso:
        console.print(f"Checking the signature of {iso}", soft_wrap=True, highlight=False)
        checked = check_iso(Path(iso), folder / "logs" / "bed.log")
        bed = OfficialBed(checked, machine, folder)
        again += f" --iso {shlex.quote(iso)}"
    else:
        bed = Bed(folder, on_build=lambda name: console.print(f"  building {name}"), person=machine)
    go(
        bed,
        of_person(machine.name, official=bool(iso)),
        ("provision",),
        again,
        console,
        resume=resume,
        cold=cold,
        keep=keep,
    )


def of_person(name: str, *, official: bool) -> str:
    """The folder below `vm/` of a person's own machine."""
    return f"iso-of-{name}" if official else f"of-{name}"


def go(
    entered: Bed | OfficialBed, name: str, tasks: Sequence[str], again: str, console: Console, *, resume: bool, cold: bool, keep: bool
) -> None:  # fmt: skip
    """The phases of a rehearsal, `tasks` of them by the project's commands, of the machine in the bed's `vm/NAME`."""
    path = entered.folder / "vm" / name / "rehearsal.json"
    record = load_record(path, again.replace(" --resume", "")) if resume else Record(path)
    phases = Phases(record, console, hint=f"Go on from here: {again}")
    rehearsal, failed = None, None
    with ExitStack() as stack:
        try:
            with phases.run("programs"):
                installed = tools.install_missing(entered.log, entered.programs)
                console.print(f"  installed {', '.join(installed)}" if installed else "  all there")
            with phases.run("bed"):
                stack.enter_context(entered)
                vm = new_machine(entered, name)
                if not (cold or resume or vm.hardware.tpm):
                    entered.prepare(vm)
                show_bed(entered, console)
            rehearsal = Rehearsal(entered, vm, console)
            with phases.run("boot"):
                rehearsal.boot_again() if resume else rehearsal.boot(cold=cold)
            for task in tasks:
                if not (resume and task in record.seconds):
                    with phases.run(task):
                        getattr(rehearsal, task)()
        except ProvisionError as error:
            failed = with_screen(error, rehearsal)
        finally:
            show_table(record, path.parent, console)
        if keep and rehearsal and rehearsal.vm.running:
            if failed:  # now, and not once somebody has pressed Ctrl-C
                console.print(f"\n[red]error:[/] {escape(str(failed))}\n", soft_wrap=True, highlight=False)
                failed = ProvisionError("It failed, as was said above.", failed.hint)
            hold(rehearsal)
    if failed:
        raise failed


def new_machine(bed: Bed | OfficialBed, name: str) -> Vm:
    disks, tpm = (bed.likeness.disks, bed.likeness.tpm) if bed.likeness else (DISKS, False)
    return bed.machine(name, disks, tpm=tpm)


def show_bed(bed: Bed | OfficialBed, console: Console) -> None:
    first, *more = bed.describe()
    for line in (f"{bed.accelerator.name}; {first}", *more):
        console.print(f"  {escape(line)}", soft_wrap=True, highlight=False)
    for difference in bed.likeness.differences if bed.likeness else ():
        console.print(f"  otherwise than the machine: {escape(difference)}", soft_wrap=True)


def with_screen(error: ProvisionError, rehearsal: Rehearsal | None) -> ProvisionError:
    """The same error; of a machine that is on and has a screen, with a picture of that."""
    if rehearsal is None or not (rehearsal.vm.hardware.optical and rehearsal.vm.running):
        return error
    with suppress(ProvisionError, OSError):
        return ProvisionError(error.message, f"{error.hint}\nIts screen: {rehearsal.vm.save_screen()}")
    return error


@dataclass
class Phases:
    """Times phases into a record, and says which one failed."""

    record: Record
    console: Console
    hint: str

    @contextmanager
    def run(self, name: str) -> Iterator[None]:
        self.console.print(f"[bold]{name}[/]")
        self.record.seconds.pop(name, None)
        began = time.monotonic()
        try:
            yield
        except ProvisionError as error:
            hints = [error.hint, self.hint]
            raise ProvisionError(
                f"Phase '{name}' failed. {error.message}", "\n".join(filter(None, hints))
            ) from error
        self.record.seconds[name] = time.monotonic() - began
        self.record.save()


def hold(rehearsal: Rehearsal) -> None:
    """Leave the machine on until Ctrl-C, and say how to reach it."""
    if not rehearsal.vm.running:
        return
    variables = f"METAL_MACHINES={rehearsal.machines}"
    which = f" --machine {rehearsal.name}" if rehearsal.bed.person else ""
    which += " --iso" if isinstance(rehearsal.bed, OfficialBed) else ""
    rehearsal.console.print(
        f"The machine stays on until Ctrl-C. From another terminal:\n"
        f"  python -m provision.rehearsal ssh{which}\n  {variables} fab -H {rehearsal.name} plan",
        soft_wrap=True,
        highlight=False,
    )
    with suppress(KeyboardInterrupt):
        while rehearsal.vm.running:
            time.sleep(1)


def show_table(record: Record, folder: Path, console: Console) -> None:
    table = Table("phase", "seconds", box=None)
    table.columns[1].justify = "right"
    for name, seconds in record.seconds.items():
        table.add_row(name, f"{seconds:.1f}")
    table.add_row("[bold]total[/]", f"[bold]{sum(record.seconds.values()):.1f}[/]")
    console.print()
    console.print(table)
    console.print(
        f"Logs: {folder / 'logs'}, console of the machine: {folder / 'serial.log'}",
        soft_wrap=True,
        highlight=False,
    )
