"""Training on a host, as a person drives it: start, follow, stop, go on, look at, take away.

On the host, below the user's home (runs.py has the folder of a run, and its unit):

    metal/source/HASH/workload/…     the package as it was sent; a run keeps using the one it began with
    metal/data/…                     what --data named
    metal/runs/ID/                   one run

Ctrl-C and lost connections end the following only. The same command again follows the run that it began.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from shlex import join

from provision.dataset import Data, find_data, prepare_arguments, send_data
from provision.errors import ProvisionError
from provision.host import Host
from provision.machine import Machine
from provision.person import Ask
from provision.preflight import (
    Runs,
    demand_ready,
    describe_device,
    look,
    look_for_runs,
    runs_bytes,
)
from provision.runs import (
    Folder,
    checked_run,
    new_run_id,
    remove_run,
    start_run,
    stop_run,
    train_script,
    unit_of,
)
from provision.source import content_hash, package_files
from provision.system.python import ENVIRONMENT
from provision.transfer import human
from provision.units import Lines, OnLine, variables
from workload.config import Config, load_config
from workload.errors import WorkloadError

LAST_LINES = 20

Say = Callable[[str], object]


def command_id(folder: Folder, source: str, arguments: Sequence[str], prepare: Sequence[str] = ()) -> str:
    """The same for the same source, preset and settings, whatever the run's id."""
    return hashlib.sha256(train_script(folder, source, "RUN", arguments, prepare).encode()).hexdigest()


def train(
    host: Host,
    machine: Machine,
    *,
    preset: str = "demo",
    name: str = "",
    data: str = "",
    settings: Sequence[str] = (),
    detach: bool = False,
    resume: str = "",
    share: bool = False,
    on_line: OnLine = print,
    say: Say = print,
) -> str:
    """Start a run and follow it to its end; its id. With `resume`, an ended run goes on with this source and settings.

    The same preset, settings and source as a run at work joins that one. Raises ProvisionError where another
    run is at work (unless `share`), where the machine is not ready, and with the last lines of its log where the
    run fails.
    """
    config = checked_config(preset, settings)
    if name:
        checked_run(name)
    wanted = find_data(data, config.data.tokenizer, config.data.val_fraction, say)
    files = package_files()
    source = content_hash(files)
    seen = look(host, machine, source, wanted.key)
    folder = seen.runs.folder
    arguments = chosen(preset, settings, wanted, folder, resume)
    prepare = prepare_arguments(wanted, folder, config.data.tokenizer, config.data.val_fraction)
    command = command_id(folder, source, arguments, prepare)
    for run, at_work in seen.runs.active.items():
        if at_work == command and resume in ("", run) and run.endswith(name):
            say(f"{run} is at work already")
            return run if detach else follow_run(host, folder, run, on_line=on_line, say=say)
        if not share:
            raise already_training(host, run)
    if resume:
        last_lines_offset(host, folder.run(resume))  # raises where there is no such run
    sending = bool(wanted.files) and not seen.has_data
    demand_ready(machine, seen, runs_bytes(config) + sending * wanted.size, share=share)
    if not seen.has_source:
        host.send_tree(files, folder.source(source), as_root=False)
    if sending:
        send_data(host, folder, wanted, say)
    run = resume or new_run_id(name or preset, datetime.now(UTC))
    script = train_script(folder, source, run, arguments, prepare)
    start_run(host, folder, run, machine.user.name, script)
    say(f"{run} has started on {host.name}, on {describe_device(machine, seen)}; in {folder.run(run)}")
    if wanted.prepare and not seen.has_data:
        say(f"First it makes token shards of {wanted.prepare}; if it is cut short it goes on with them.")
    if detach:
        say(f"fab -H {host.name} attach follows it; fab -H {host.name} fetch-checkpoints brings it home.")
        return run
    return follow_run(host, folder, run, on_line=on_line, say=say)


def chosen(preset: str, settings: Sequence[str], data: Data, folder: Folder, resume: str) -> list[str]:
    """Arguments of `workload train`."""
    source = data.source(folder)
    settings = [*settings, *([f"data.source={source}"] if source else [])]
    return [*(["--resume"] if resume else ["--preset", preset]), *(["--set", *settings] if settings else [])]


def checked_config(preset: str, settings: Sequence[str]) -> Config:
    """Find a misspelt preset or setting here, before anything is sent."""
    try:
        return load_config(preset, settings)
    except WorkloadError as error:
        raise ProvisionError(error.message, error.hint) from error


def already_training(host: Host, run: str) -> ProvisionError:
    return ProvisionError(
        f"{host.name} is already training: {run}.",
        f"fab -H {host.name} stop ends it (it saves first); fab -H {host.name} attach follows it; "
        "--share trains beside it.",
    )


def find_run(host: Host, machine: Machine, run: str) -> tuple[Runs, str]:
    """The runs, and the one that is meant: `run`, or the one at work, or the last one."""
    if run:
        checked_run(run)
    runs = look_for_runs(host, machine)
    run = run or next(iter(runs.active), runs.last)
    if not run:
        raise ProvisionError(f"There is no run on {host.name} yet.", f"fab -H {host.name} train")
    return runs, run


def no_such_run(host: Host, run: str) -> ProvisionError:
    return ProvisionError(f"There is no run {run} on {host.name}.", f"fab -H {host.name} runs")


def attach(host: Host, machine: Machine, run: str = "", *, on_line: OnLine = print, say: Say = print) -> str:
    """Follow a run again, from its last lines on; without an id, the one at work, or the last one. Its id."""
    runs, run = find_run(host, machine, run)
    say(f"{run} {'is at work' if run in runs.active else 'has ended'}; its last lines:")
    return follow_run(host, runs.folder, run, on_line=on_line, say=say)


def resume(
    host: Host,
    machine: Machine,
    run: str = "",
    *,
    detach: bool = False,
    on_line: OnLine = print,
    say: Say = print,
) -> str:
    """Let a run that ended go on from its newest checkpoint, as it was begun; follow it. Its id."""
    runs, run = find_run(host, machine, run)
    for other in runs.active:
        if other != run:
            raise already_training(host, other)
    match start_run(host, runs.folder, run, machine.user.name):
        case "missing":
            raise no_such_run(host, run)
        case "running":
            say(f"{run} is at work already")
        case _:
            say(f"{run} goes on, on {host.name}")
    return run if detach else follow_run(host, runs.folder, run, on_line=on_line, say=say)


def stop(
    host: Host,
    machine: Machine,
    run: str = "",
    *,
    now: bool = False,
    on_line: OnLine = print,
    say: Say = print,
) -> str:
    """End a run: it saves, and this waits for it. `now`: without saving; what follows the last checkpoint is lost."""
    runs, run = find_run(host, machine, run)
    offset = last_lines_offset(host, runs.folder.run(run), lines=0)
    match stop_run(host, runs.folder, run, now=now):
        case "missing":
            raise no_such_run(host, run)
        case "ended":
            say(f"{run} on {host.name} has ended already.")
            return run
        case "ended-now":
            say(f"{run} on {host.name} was ended; it goes on from its last checkpoint with resume.")
            return run
    say(f"{run}: it saves, then ends; waiting for that")
    folder = runs.folder.run(run)
    code = host.follow(
        folder / "log", unit_of(run), on_line=on_line, deadline_s=1200, offset=offset, as_root=False
    )
    if code:
        raise ProvisionError(
            f"{run} on {host.name} ended with status {code} while it was stopped; "
            "its checkpoints of before are whole.",
            f"fab -H {host.name} logs --run {run}",
        )
    say(f"{run} has ended, saved. fab -H {host.name} resume --run {run} lets it go on.")
    return run


def logs(host: Host, machine: Machine, run: str = "", lines: int = 50, *, on_line: OnLine = print) -> str:
    """Print the last lines of a run's log."""
    runs, run = find_run(host, machine, run)
    script = variables(log=runs.folder.run(run) / "log", lines=lines) + (
        '[ -r "$log" ] || exit 3\ntail -n "$lines" -- "$log"'
    )
    result = host.run(script, check=False)
    if result.code:
        raise no_such_run(host, run)
    clean = Lines(on_line)
    clean.feed(result.stdout.encode(), final=True)
    return run


def follow_run(host: Host, folder: Folder, run: str, *, on_line: OnLine, say: Say) -> str:
    """Hand out the log from its last lines on, to the end of the run."""
    path = folder.run(run)
    last: deque[str] = deque(maxlen=LAST_LINES)

    def line(text: str) -> None:
        last.append(text)
        on_line(text)

    try:
        code = host.follow(
            path / "log",
            unit_of(run),
            on_line=line,
            deadline_s=None,
            offset=last_lines_offset(host, path),
            as_root=False,
        )
    except KeyboardInterrupt:
        say(
            f"\n{run} goes on training on {host.name}. fab -H {host.name} attach follows it again;\n"
            f"fab -H {host.name} stop ends it (it saves first)."
        )
        raise
    if code:
        raise ProvisionError(
            f"{run} on {host.name} failed with status {code}:\n" + "\n".join(f"  {text}" for text in last),
            f"The whole log: fab -H {host.name} logs --run {run} --lines 1000; "
            f"once the reason is gone: fab -H {host.name} resume --run {run}",
        )
    return run


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


def sample(
    host: Host, machine: Machine, prompt: str, run: str = "", tokens: int = 200, *, say: Say = print
) -> str:
    """Let a run's best model go on from a prompt, there. Beside a run at work it takes the processor, not its GPU."""
    runs, run = find_run(host, machine, run)
    command = ["-m", "workload", "sample", str(runs.folder.run(run)), "--prompt", prompt]
    command += ["--tokens", str(tokens), *(["--device", "cpu"] if runs.active else [])]
    say(run_workload(host, runs.folder, run, command))
    return run


def report(
    host: Host,
    machine: Machine,
    home: Path,
    run: str = "",
    *,
    show: Callable[[str], object] | None = None,
    say: Say = print,
) -> Path:
    """Have a run's report made anew there, bring it to `home`/RUN/report.html; its path. `show` opens its URL."""
    runs, run = find_run(host, machine, run)
    folder = runs.folder.run(run)
    html = run_workload(host, runs.folder, run, ["-m", "workload", "report", str(folder)], then="report.html")
    path = home / run / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(".report.html.partial")
    staged.write_text(html)
    staged.replace(path)
    say(f"{run}: {path.resolve()}")
    if show:
        show(path.resolve().as_uri())
    return path


def run_workload(host: Host, folder: Folder, run: str, command: Sequence[str], then: str = "") -> str:
    """What a command of the workload prints, with the source that the run has; or the run's file `then` after it."""
    script = variables(run=folder.run(run), python=f"{ENVIRONMENT}/bin/python", then=then) + (
        'cd "$run" 2>/dev/null || exit 3\n'
        "eval \"$(grep -m 1 '^export PYTHONPATH=' script)\"\n"
        f'if [ "$then" ]; then "$python" {join(command)} >&2; cat "$then"; else "$python" {join(command)}; fi'
    )
    result = host.run(script, as_root=False, check=False, deadline_s=900)
    if result.code == 3:
        raise no_such_run(host, run)
    if result.code:
        said = result.stderr.strip().splitlines()[-LAST_LINES:]
        raise ProvisionError(f"{run} on {host.name}: " + "\n".join(said or ["it failed without a word"]))
    return result.stdout.rstrip("\n")


def remove(host: Host, machine: Machine, run: str, *, yes: bool = False, ask: Ask, say: Say = print) -> None:
    """Take a run away from its host, checkpoints and all. One at work is refused; a person is asked."""
    checked_run(run)
    runs = look_for_runs(host, machine)
    if run in runs.active:
        raise ProvisionError(f"{run} is at work on {host.name}.", f"fab -H {host.name} stop --run {run}")
    if not yes and ask(
        f"Remove {run} from {host.name}, checkpoints and all? Those that were fetched stay here. [yes/no] "
    ).lower() not in ("y", "yes"):
        raise ProvisionError(
            f"{run} was not removed.", f"fab -H {host.name} remove --run {run} --yes asks nothing."
        )
    match remove_run(host, runs.folder, run).split():
        case ["missing"]:
            raise no_such_run(host, run)
        case ["running"]:
            raise ProvisionError(f"{run} is at work on {host.name}.", f"fab -H {host.name} stop --run {run}")
        case [_, size]:
            say(f"{run} is gone from {host.name}: {human(int(size))} are free again.")
