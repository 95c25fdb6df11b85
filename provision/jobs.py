"""Training on a host, as a person drives it: start, follow, stop, go on, look at, take away.

On the host, below the user's home (runs.py has the folder of a run, and its unit):

    metal/source/HASH/workload/…     the package as it was sent; a run keeps using the one it began with
    metal/data/…                     what --data named
    metal/runs/ID/                   one run

Ctrl-C and lost connections end the following only. The same command again follows the run that it began.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from shlex import join

from provision.crew import (
    LAST_LINES,
    Member,
    Reach,
    already_training,
    demand_alike,
    demand_free,
    end_all,
    follow_run,
    has_checkpoints,
    last_lines_offset,
    meet,
    no_such_run,
    on_all,
    process_arguments,
    reach_nobody,
    start_all,
)
from provision.dataset import Data, find_data, prepare_arguments, send_data
from provision.errors import ProvisionError
from provision.host import Host
from provision.machine import Machine
from provision.person import Ask
from provision.preflight import (
    Runs,
    Seen,
    demand_ready,
    describe_device,
    look,
    look_for_runs,
    runs_bytes,
)
from provision.runs import (
    Folder,
    checked_run,
    mark_stopped,
    new_run_id,
    remove_run,
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

Say = Callable[[str], object]


def ignore(line: str) -> None:
    """Of a log that nobody asked for."""


def command_id(
    folder: Folder,
    source: str,
    arguments: Sequence[str],
    prepare: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> str:
    """The same for the same source, preset, settings and machines, whatever the run's id."""
    return hashlib.sha256(train_script(folder, source, "RUN", arguments, prepare, hosts).encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """What is to be trained, before anything is known of where."""

    preset: str
    name: str
    settings: Sequence[str]
    resume: str  # id of a run that goes on, "" for a new one
    share: bool
    config: Config
    data: Data
    files: Mapping[str, bytes]  # of the package
    source: str  # their hash

    def arguments(self, folder: Folder, crew: Sequence[Member]) -> list[str]:
        return [
            *chosen(self.preset, self.settings, self.data, folder, self.resume),
            *process_arguments(crew),
        ]

    def prepare(self, folder: Folder) -> list[str]:
        wanted = self.config.data
        return prepare_arguments(self.data, folder, wanted.tokenizer, wanted.val_fraction)


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
    beside: Sequence[str] = (),
    reach: Reach = reach_nobody,
    on_line: OnLine = print,
    say: Say = print,
) -> str:
    """Start a run and follow it to its end; its id. With `resume`, an ended run goes on with this source and settings.

    `beside`: machines that train it together with this one, which leads; `reach` finds them. The same preset, settings,
    source and machines as a run at work joins that one. Raises ProvisionError where another run is at work (unless
    `share`), where a machine is not ready, and with the last lines of its log where the run fails.
    """
    config = checked_config(preset, settings)
    if name:
        checked_run(name)
    wanted = find_data(data, config.data.tokenizer, config.data.val_fraction, say)
    files = package_files()
    job = Job(preset, name, settings, resume, share, config, wanted, files, content_hash(files))
    with ExitStack() as stack:
        others = [stack.enter_context(reach(other)) for other in beside]
        machines = {host: machine, **{other: other.wanted.machine for other in others}}
        seen = on_all([host, *others], lambda each: look(each, machines[each], job.source, wanted.key))
        crew = [Member(each, machines[each], its) for each, its in zip(machines, seen, strict=True)]
        folder = seen[0].runs.folder
        run = find_begun(crew, job)
        if run:
            say(f"{run} is at work already")
        else:
            run = begin(crew, job, say)
            if detach:
                say(
                    f"fab -H {host.name} attach follows it; fab -H {host.name} fetch-checkpoints brings it home."
                )
        if detach:
            return run
        begun = not resume and run not in seen[0].runs.active
        return follow_run(host, folder, run, on_line=on_line, say=say, others=others, begun=begun)


def begin(crew: Sequence[Member], job: Job, say: Say) -> str:
    """Check, send, start; the run's id. Until every machine has been found ready nothing is sent to any."""
    hosts, folder = [member.host for member in crew], crew[0].seen.runs.folder
    if job.resume:
        last_lines_offset(hosts[0], folder.run(job.resume))  # raises where there is no such run
    for member in crew:
        need_bytes = runs_bytes(job.config) if member is crew[0] else 0
        need_bytes += lacks_data(job.data, member.seen) * job.data.size
        demand_ready(member.machine, member.seen, need_bytes, share=job.share)
    demand_alike(crew, job.config)
    several = len(crew) > 1
    nodes = meet(hosts) if several else []
    seen = {member.host: member.seen for member in crew}

    def send(host: Host) -> None:
        if not seen[host].has_source:
            host.send_tree(job.files, folder.source(job.source), as_root=False)
        if lacks_data(job.data, seen[host]):
            send_data(host, folder, job.data, say)

    on_all(hosts, send)
    run = job.resume or new_run_id(job.name or job.preset, datetime.now(UTC))
    names = [host.name for host in hosts] if several else []
    script = train_script(folder, job.source, run, job.arguments(folder, crew), job.prepare(folder), names)
    if start_all(hosts, folder, run, nodes, script) == "running":  # --resume, with other settings
        raise already_training(hosts[0], run)
    places = [f"{member.name}, on {describe_device(member.machine, member.seen)}" for member in crew]
    led = f", led by {hosts[0].name}" if several else ""
    say(f"{run} has started on {'; on '.join(places)}{led}; in {folder.run(run)}")
    if job.data.prepare and not all(member.seen.has_data for member in crew):
        say(f"First it makes token shards of {job.data.prepare}; if it is cut short it goes on with them.")
    return run


def lacks_data(wanted: Data, seen: Seen) -> bool:
    return bool(wanted.files) and not seen.has_data


def find_begun(crew: Sequence[Member], job: Job) -> str:
    """The run at work that the same command began, "" for none. Raises ProvisionError where another one is in the way."""
    folder, found = crew[0].seen.runs.folder, ""
    names = [member.name for member in crew] if len(crew) > 1 else []
    command = command_id(folder, job.source, job.arguments(folder, crew), job.prepare(folder), names)
    for run, at_work in crew[0].seen.runs.active.items():
        if at_work == command and job.resume in ("", run) and run.endswith(job.name):
            found = run
    for each in crew:
        for run in each.seen.runs.active:
            if run != found and not job.share:
                raise already_training(each.host, run)
        if found and found not in each.seen.runs.active:
            raise ProvisionError(
                f"{found} is at work on {crew[0].name}, and not on {each.name}, which is part of it.",
                f"fab -H {crew[0].name} stop, then fab -H {crew[0].name} resume begins it on all of them.",
            )
    return found


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


def find_run(host: Host, machine: Machine, run: str) -> tuple[Runs, str]:
    """The runs, and the one that is meant: `run`, or the one at work, or the last one."""
    if run:
        checked_run(run)
    runs = look_for_runs(host, machine)
    run = run or next(iter(runs.active), runs.last)
    if not run:
        raise ProvisionError(f"There is no run on {host.name} yet.", f"fab -H {host.name} train")
    return runs, run


@contextmanager
def crew_of(
    host: Host, runs: Runs, run: str, reach: Reach, without: Sequence[str], say: Say
) -> Iterator[list[Host]]:
    """Sessions to the other machines of a run, as far as they answer; none for a run on one."""
    with ExitStack() as stack:
        others = []
        for name in runs.hosts.get(run, ()):
            if name == host.name or name in without:
                continue
            try:
                others.append(stack.enter_context(reach(name)))
            except ProvisionError as error:
                say(f"{name}, which is part of {run}: {error.message}")
        yield others


def leads(host: Host, runs: Runs, run: str) -> bool:
    """Whether this machine has the run's checkpoints and its log."""
    return runs.hosts.get(run, (host.name,))[0] == host.name


def demand_leader(host: Host, runs: Runs, run: str, task: str) -> None:
    if not leads(host, runs, run):
        lead = runs.hosts[run][0]
        raise ProvisionError(
            f"{run} trains on {' and '.join(runs.hosts[run])}; what it has lies on {lead}, which leads it.",
            f"fab -H {lead} {task} --run {run}",
        )


def attach(
    host: Host,
    machine: Machine,
    run: str = "",
    *,
    reach: Reach = reach_nobody,
    beside: Sequence[str] = (),
    on_line: OnLine = print,
    say: Say = print,
) -> str:
    """Follow a run again, from its last lines on; without an id, the one at work, or the last one. Its id.

    `reach`: how a run's other machines are found, but for those `beside` this one, which are followed by another call.
    """
    runs, run = find_run(host, machine, run)
    say(f"{run} {'is at work' if run in runs.active else 'has ended'}; its last lines:")
    if not leads(host, runs, run):
        say(
            f"{runs.hosts[run][0]} leads it; what follows is said by {host.name}, where it is silent but for errors."
        )
        return follow_run(host, runs.folder, run, on_line=on_line, say=say)
    without = runs.hosts.get(run, ()) if run not in runs.active else beside
    with crew_of(host, runs, run, reach, without, say) as others:
        return follow_run(host, runs.folder, run, on_line=on_line, say=say, others=others)


def resume(
    host: Host,
    machine: Machine,
    run: str = "",
    *,
    detach: bool = False,
    reach: Reach = reach_nobody,
    beside: Sequence[str] = (),
    on_line: OnLine = print,
    say: Say = print,
) -> str:
    """Let a run that ended go on from its newest checkpoint, as it was begun; follow it. Its id.

    One over several machines goes on on all of them: `reach` finds them. `beside`: machines that the person named, too.
    """
    runs, run = find_run(host, machine, run)
    names = runs.hosts.get(run, ())
    if not leads(host, runs, run):
        if names[0] not in beside:
            demand_leader(host, runs, run, "resume")
        say(f"{run} is led by {names[0]}, which begins it here, too.")
        return run
    with ExitStack() as stack:
        others = [stack.enter_context(reach(name)) for name in names[1:]]
        crew = (host, *others)
        for other in runs.active:
            if other != run:
                raise already_training(host, other)
        nodes = []
        if others:
            demand_free(others, run)
        if others and run not in runs.active:
            end_all(others, runs.folder, run)  # they may wait for this one where it was before
            nodes = meet(crew)
        match start_all(crew, runs.folder, run, nodes):
            case "missing":
                raise no_such_run(host, run)
            case "running":
                say(f"{run} is at work already")
            case _:
                say(f"{run} goes on, on {', '.join(each.name for each in crew)}")
        if detach:
            return run
        return follow_run(host, runs.folder, run, on_line=on_line, say=say, others=others)


def stop(
    host: Host,
    machine: Machine,
    run: str = "",
    *,
    now: bool = False,
    reach: Reach = reach_nobody,
    on_line: OnLine = print,
    say: Say = print,
) -> str:
    """End a run: it saves, and this waits for it. `now`: without saving; what follows the last checkpoint is lost.

    One over several machines ends on all: `reach` finds the others, whose units learn first that it is to end.
    """
    runs, run = find_run(host, machine, run)
    offset = last_lines_offset(host, runs.folder.run(run), lines=0)
    with crew_of(host, runs, run, reach, (), say) as others:
        if now:
            end_all(others, runs.folder, run)
        elif others:
            on_all(others, lambda other: mark_stopped(other, runs.folder, run))
        match stop_run(host, runs.folder, run, now=now):
            case "missing":
                raise no_such_run(host, run)
            case "ended":
                say(f"{run} on {host.name} has ended already.")
            case "ended-now":
                say(f"{run} on {host.name} was ended; it goes on from its last checkpoint with resume.")
            case _:
                say(f"{run}: it saves, then ends; waiting for that")
                wait_for_end(host, runs.folder, run, offset, on_line=on_line)
                saved = has_checkpoints(host, runs.folder, run)
                how, then = (
                    ("saved", "lets it go on")
                    if saved
                    else ("before its first checkpoint", "begins it again")
                )
                say(f"{run} has ended, {how}. fab -H {host.name} resume --run {run} {then}.")
        for other in others:  # they end with the first; one that waited for it does so now
            if stop_run(other, runs.folder, run, now=False) == "stopping":
                wait_for_end(other, runs.folder, run)
    return run


def wait_for_end(
    host: Host, folder: Folder, run: str, offset: int | None = None, *, on_line: OnLine = ignore
) -> None:
    """Of a run that was told to stop. Raises ProvisionError where it fails instead."""
    path = folder.run(run)
    code = host.follow(
        path / "log",
        unit_of(run),
        on_line=on_line,
        deadline_s=1200,
        offset=last_lines_offset(host, path, lines=0) if offset is None else offset,
        as_root=False,
    )
    if code:
        raise ProvisionError(
            f"{run} on {host.name} ended with status {code} while it was stopped; "
            "its checkpoints of before are whole.",
            f"fab -H {host.name} logs --run {run}",
        )


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


def sample(
    host: Host, machine: Machine, prompt: str, run: str = "", tokens: int = 200, *, say: Say = print
) -> str:
    """Let a run's best model go on from a prompt, there. Beside a run at work it takes the processor, not its GPU."""
    runs, run = find_run(host, machine, run)
    demand_leader(host, runs, run, "sample")
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
    demand_leader(host, runs, run, "report")
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
            if others := [name for name in runs.hosts.get(run, ()) if name != host.name]:
                say(
                    f"Its part on {', '.join(others)} is still there: fab -H {','.join(others)} remove --run {run}"
                )
