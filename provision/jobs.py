"""Training on a host: send the package by the hash of its content, start a run as a systemd unit, follow its log.

On the host, below the user's home:

    metal/source/HASH/workload/…     the package as it was sent; a run keeps using the one it began with
    metal/runs/ID/                   one run: what the workload writes, and log, status, script of its unit

The unit `metal-run-ID` belongs to the system's manager and runs as the user, so it needs nobody to be logged in.
Ctrl-C and lost connections end the following only. The same command again follows the run that it began.
"""

import hashlib
import re
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath
from shlex import join, quote

from provision.errors import ProvisionError, ScriptFailed
from provision.host import Host
from provision.machine import Machine
from provision.system.python import ENVIRONMENT
from provision.units import OnLine, variables
from workload.config import load_config
from workload.errors import WorkloadError

PYTHON = f"{ENVIRONMENT}/bin/python"
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LAST_LINES = 20
PROPERTIES = (
    "KillSignal=SIGTERM",  # the workload saves on it and ends with status 0
    "TimeoutStopSec=600",  # a checkpoint of the largest model on a slow disk
    "OOMPolicy=continue",  # the kernel kills a process, not the run's record of it
)

Say = Callable[[str], object]


@dataclass(frozen=True)
class Seen:
    """What one exec found: absolute folders of the host, whether it has the source, and the runs at work."""

    folder: PurePosixPath
    has_source: bool
    active: dict[str, str]  # run id → hash of its command, see `command_id`
    last: str  # the run that was begun last (ids sort by time), "" where there is none

    def run(self, run: str) -> PurePosixPath:
        return self.folder / "runs" / run


# `active` says what each unit that is at work was asked to do, with its own id taken out.
LOOK = r"""
[ -x "$python" ] || { echo "there is no $python" >&2; exit 3; }
cd ~
echo "folder $PWD/$folder"
[ ! -e "$folder/source/$hash" ] || echo source
for id in "$folder"/runs/*/id; do
  run=${id%/id}
  [ -e "$id" ] || continue
  echo "last ${run##*/}"
  [ ! -e "$run/status" ] || continue
  case "$(systemctl is-active "metal-run-${run##*/}.service" || true)" in
    active|activating|deactivating|reloading)
      sum=$(sed "s/${run##*/}/RUN/g" <"$run/script" | sha256sum)
      echo "active ${run##*/} ${sum%% *}";;
  esac
done
"""


def package_files(package: str = "workload") -> dict[str, bytes]:
    """Relative path → content of the installed package, without what Python makes by itself."""
    found: dict[str, bytes] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                if entry.name != "__pycache__":
                    walk(entry, f"{prefix}{entry.name}/")
            elif not entry.name.endswith((".pyc", "~")) and not entry.name.startswith("."):
                found[prefix + entry.name] = entry.read_bytes()

    walk(resources.files(package), f"{package}/")
    return found


def content_hash(files: Mapping[str, bytes]) -> str:
    """Twelve hex digits that differ when a name or a byte differs."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    return digest.hexdigest()[:12]


def new_run_id(preset: str, now: datetime) -> str:
    """Sorts by time, says what it is, and is nobody else's."""
    return f"{now.astimezone(UTC):%Y%m%d-%H%M%S}-{preset}-{secrets.token_hex(2)}"


def train_script(folder: PurePosixPath, source: str, run: str, arguments: Sequence[str]) -> str:
    """What the unit runs. `exec`, so that the signal that stops the unit reaches Python itself."""
    out = folder / "runs" / run
    command = ["-m", "workload", "train", "--out", str(out), *arguments]
    return (
        f"cd {quote(str(out))}\n"
        f"export PYTHONPATH={quote(str(folder / 'source' / source))} PYTHONUNBUFFERED=1\n"
        # By its real path: a new environment may take the link's place while the run still imports.
        f'exec "$(readlink -f {ENVIRONMENT})"/bin/python {join(command)}\n'
    )


def command_id(folder: PurePosixPath, source: str, arguments: Sequence[str]) -> str:
    """The same for the same source, preset and settings, whatever the run's id."""
    return hashlib.sha256(train_script(folder, source, "RUN", arguments).encode()).hexdigest()


def parse_look(text: str) -> Seen:
    folder, has_source, active, last = "", False, {}, ""
    for line in text.splitlines():
        match line.split(" ", 2):
            case ["folder", *path]:
                folder = " ".join(path)
            case ["source"]:
                has_source = True
            case ["last", run]:
                last = run
            case ["active", run, command]:
                active[run] = command
    return Seen(PurePosixPath(folder), has_source, active, last)


def look(host: Host, machine: Machine, source: str) -> Seen:
    """One exec, as the user. Raises ProvisionError where the machine is not ready to train."""
    if host.system != "installed":
        raise ProvisionError(
            f"{host.name} is on the install ISO; nothing can be trained there.",
            f"fab -H {host.name} provision",
        )
    script = variables(python=PYTHON, folder=machine.train.folder, hash=source) + LOOK
    try:
        return parse_look(host.run(script, as_root=False).stdout)
    except ScriptFailed as error:
        if error.code != 3:
            raise
        raise ProvisionError(
            f"{host.name} has no Python environment: {PYTHON} is missing.", f"fab -H {host.name} provision"
        ) from error


def train(
    host: Host,
    machine: Machine,
    *,
    preset: str = "gpt2-124m",
    settings: Sequence[str] = (),
    detach: bool = False,
    resume: str = "",
    on_line: OnLine = print,
    say: Say = print,
) -> str:
    """Start a run and follow it to its end; its id. With `resume`, an ended run goes on from its checkpoint.

    The same preset, settings and source as a run at work joins that one. Raises ProvisionError where another
    run is at work, and with the last lines of its log where the run fails.
    """
    check_settings(preset, settings)
    files = package_files()
    source = content_hash(files)
    chosen = ["--resume"] if resume else ["--preset", preset]
    arguments = [*chosen, *(["--set", *settings] if settings else [])]
    seen = look(host, machine, source)
    wanted = command_id(seen.folder, source, arguments)
    for run, command in seen.active.items():
        if command != wanted or resume not in ("", run):
            raise ProvisionError(
                f"{host.name} is already training: {run}.",
                f"To stop it (it saves first), on {host.name}:  sudo systemctl stop metal-run-{run}",
            )
        say(f"{run} is at work already")
        return run if detach else follow_run(host, seen, run, on_line=on_line, say=say)
    if resume:
        last_lines_offset(host, seen.run(checked_run(resume)))  # raises where there is no such run
    if not seen.has_source:
        host.send_tree(files, seen.folder / "source" / source, as_root=False)
    run = resume or new_run_id(preset, datetime.now(UTC))
    unit_script = train_script(seen.folder, source, run, arguments)
    host.start_unit(
        unit_of(run),
        unit_script,
        folder=seen.run(run),
        user=machine.user.name,
        own=True,
        properties=[*PROPERTIES, f"Description=training run {run}"],
    )
    say(f"{run} has started on {host.name}, in {seen.run(run)}")
    if detach:
        say(f"fab -H {host.name} attach follows it; fab -H {host.name} fetch-checkpoints brings it home.")
        return run
    return follow_run(host, seen, run, on_line=on_line, say=say)


def attach(host: Host, machine: Machine, run: str = "", *, on_line: OnLine = print, say: Say = print) -> str:
    """Follow a run again, from its last lines on; without an id, the one at work, or the last one. Its id."""
    seen = look(host, machine, content_hash(package_files()))
    run = run or next(iter(seen.active), seen.last)
    if not run:
        raise ProvisionError(f"There is no run on {host.name} yet.", f"fab -H {host.name} train")
    say(f"{run} {'is at work' if run in seen.active else 'has ended'}; its last lines:")
    return follow_run(host, seen, run, on_line=on_line, say=say)


def follow_run(host: Host, seen: Seen, run: str, *, on_line: OnLine, say: Say) -> str:
    """Hand out the log from its last lines on, to the end of the run."""
    folder = seen.run(checked_run(run))
    last: deque[str] = deque(maxlen=LAST_LINES)

    def line(text: str) -> None:
        last.append(text)
        on_line(text)

    try:
        code = host.follow(
            folder / "log",
            unit_of(run),
            on_line=line,
            deadline_s=None,
            offset=last_lines_offset(host, folder),
            as_root=False,
        )
    except KeyboardInterrupt:
        say(
            f"\n{run} goes on training on {host.name}. fab -H {host.name} attach follows it again.\n"
            f"To stop it (it saves first), on {host.name}:  sudo systemctl stop {unit_of(run)}"
        )
        raise
    if code:
        raise ProvisionError(
            f"{run} on {host.name} failed with status {code}:\n" + "\n".join(f"  {text}" for text in last),
            f"The whole log, on {host.name}:  {folder / 'log'}",
        )
    return run


def last_lines_offset(host: Host, folder: PurePosixPath) -> int:
    """Where the last lines of a run's log begin, in bytes. Raises ProvisionError where there is no such run."""
    script = variables(log=folder / "log", lines=LAST_LINES) + (
        '[ -r "$log" ] || exit 3\n'
        'size=$(stat -c %s -- "$log")\n'
        'kept=$(head -c "$size" -- "$log" | tail -n "$lines" | wc -c)\n'
        "echo $((size - kept))"
    )
    result = host.run(script, as_root=False, check=False)
    if result.code:
        raise ProvisionError(
            f"There is no run {folder.name} on {host.name}.", f"On {host.name}:  ls {folder.parent}"
        )
    return int(result.stdout)


def check_settings(preset: str, settings: Sequence[str]) -> None:
    """Find a misspelt preset or setting here, before anything is sent."""
    try:
        load_config(preset, settings)
    except WorkloadError as error:
        raise ProvisionError(error.message, error.hint) from error


def checked_run(run: str) -> str:
    if not RUN_ID.fullmatch(run):
        raise ProvisionError(f"'{run}' is not the id of a run; expected letters, digits, '.', '_' and '-'.")
    return run


def unit_of(run: str) -> str:
    return f"metal-run-{run}"
