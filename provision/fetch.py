"""Checkpoints home: remote manifests against local ones, rsync of what is missing into staging, sha256, rename.

    checkpoints/NAME/RUN/checkpoints/step-00000200/…   complete, verified; manifest.json is written last
    checkpoints/NAME/RUN/checkpoints/{latest,best}
    checkpoints/NAME/RUN/{config.toml,metrics.jsonl,report.html}
    checkpoints/NAME/.staging/…                        what is on its way; the next fetch goes on with it

One exec lists what the host has. Where nothing is missing, that is all. What the host says is checked before
it is used as a path: it may be anything.
"""

import errno
import fcntl
import json
import os
import re
import shutil
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from provision.errors import ProvisionError
from provision.host import Host
from provision.machine import Machine
from provision.runs import checked_run
from provision.transfer import hash_file, human
from provision.units import AT_WORK, variables

MANIFEST = "manifest.json"
BESIDE = ("config.toml", "metrics.jsonl", "report.html")  # of a run, fetched when they differ
POINTERS = ("latest", "best")
CHECKPOINT = re.compile(r"step-\d{8,12}")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,100}")
SHA256 = re.compile(r"[0-9a-f]{64}")
RSYNC_PARTIAL = (
    23,
    24,
)  # some files could not be had: pruned meanwhile, or unreadable; the hashes tell which

Say = Callable[[str], object]

# One line a fact: run ID, at-work, file NAME BYTES SHA256, pointer NAME VALUE, manifest CHECKPOINT BASE64. The pointers
# are read before the manifests: so what a pointer names was complete. Names that cannot be valid are left out.
LIST = r"""
cd ~
[ -d "$runs" ] || exit 0
cd "$runs"
for run in ${only:-*}; do
  case "$run" in *[!A-Za-z0-9._-]*) continue;; esac
  [ -d "$run" ] || continue
  echo "run $run"
  if [ ! -e "$run/status" ] && at_work "metal-run-$run"; then echo at-work; fi
  for name in $beside; do
    [ -f "$run/$name" ] || continue
    sum=$(sha256sum <"$run/$name")
    echo "file $name $(stat -c %s -- "$run/$name") ${sum%% *}"
  done
  for name in $pointers; do
    [ -f "$run/checkpoints/$name" ] && echo "pointer $name $(head -c 100 -- "$run/checkpoints/$name")"
  done
  for manifest in "$run"/checkpoints/step-*/manifest.json; do
    [ -f "$manifest" ] || continue
    folder=${manifest%/*}
    case "${folder##*/}" in *[!a-z0-9-]*) continue;; esac
    echo "manifest ${folder##*/} $(base64 -w 0 <"$manifest" 2>/dev/null)"
  done
done
"""


@dataclass(frozen=True)
class Piece:
    """A file as the host describes it."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Listed:
    """A checkpoint that is complete on the host; the bytes of its manifest, and the files that it names."""

    run: str
    name: str
    manifest: bytes
    files: Mapping[str, Piece]

    @property
    def path(self) -> PurePosixPath:
        return PurePosixPath(self.run, "checkpoints", self.name)

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.files.values())


@dataclass
class Run:
    """A run as the host lists it."""

    name: str
    files: dict[str, Piece] = field(default_factory=dict)
    pointers: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[str, Listed] = field(default_factory=dict)
    at_work: bool = False

    def chosen(self, which: str) -> list[Listed]:
        """Those that `which` means: all, latest, best, or a step. A run without that pointer gives its newest."""
        if which == "all":
            return list(self.checkpoints.values())
        name = f"step-{int(which):08d}" if which.isdecimal() else self.pointers.get(which, "")
        if name not in self.checkpoints and not which.isdecimal():
            name = max(self.checkpoints, default="")
        return [listed for listed in self.checkpoints.values() if listed.name == name]


@dataclass(frozen=True)
class Listing:
    """`refused`: what the host said that cannot be used, in words."""

    runs: Mapping[str, Run]
    refused: Sequence[str]

    @property
    def checkpoints(self) -> list[Listed]:
        return [listed for run in self.runs.values() for listed in run.checkpoints.values()]


@dataclass(frozen=True)
class Fetched:
    """What a fetch did: checkpoints that were moved, how many are here now, and its cost."""

    moved: tuple[PurePosixPath, ...]
    here: int
    execs: int
    bytes_received: int
    at_work: bool = False  # a run that was asked for trains on


def parse_manifest(data: bytes) -> dict[str, Piece]:
    """The files of a manifest. ValueError where it is not one, or names what is not a plain file of its folder."""
    try:
        manifest = json.loads(data)
        files = {name: Piece(entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        version = manifest["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its manifest cannot be read ({error!r})") from error
    if version != 1:
        raise ValueError(f"its manifest has format {version!r}; this version reads format 1")
    for name, piece in files.items():
        if not FILE.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"its manifest names the file {name!r}")
        if type(piece.size) is not int or piece.size < 0:
            raise ValueError(f"its manifest gives {name} {piece.size!r} bytes")
        if not isinstance(piece.sha256, str) or not SHA256.fullmatch(piece.sha256):
            raise ValueError(f"its manifest gives {name} the sha256 {piece.sha256!r}")
    return files


def parse_listing(text: str) -> Listing:
    """What LIST printed. Nothing in it is believed that could leave its folder."""
    runs: dict[str, Run] = {}
    refused: list[str] = []
    run = Run("")
    for line in text.splitlines():
        match line.split(" "):
            case ["run", name] if FILE.fullmatch(name):
                run = runs.setdefault(name, Run(name))
            case ["at-work"]:
                run.at_work = True
            case ["file", name, size, sha256] if (
                name in BESIDE and size.isdigit() and SHA256.fullmatch(sha256)
            ):
                run.files[name] = Piece(int(size), sha256)
            case ["pointer", name, value] if name in POINTERS and CHECKPOINT.fullmatch(value):
                run.pointers[name] = value
            case ["manifest", name, coded] if CHECKPOINT.fullmatch(name):
                try:
                    data = b64decode(coded, validate=True)
                    run.checkpoints[name] = Listed(run.name, name, data, parse_manifest(data))
                except ValueError as error:
                    refused.append(f"{run.name}/checkpoints/{name}: {error}")
            case _:
                refused.append(f"the host lists {line[:200]!r}")
    return Listing(runs, refused)


def is_here(folder: Path, listed: Listed) -> bool:
    """Whether the local checkpoint is that one: the same manifest, and every file there in its size."""
    here = folder / listed.path
    try:
        if (here / MANIFEST).read_bytes() != listed.manifest:
            return False
        return all((here / name).stat().st_size == piece.size for name, piece in listed.files.items())
    except OSError:
        return False


def matches(path: Path, piece: Piece) -> bool:
    return path.is_file() and path.stat().st_size == piece.size and hash_file(path) == piece.sha256


def fetch_checkpoints(
    host: Host, machine: Machine, destination: Path, run: str = "", which: str = "all", *, say: Say = print
) -> Fetched:
    """Bring what is complete on the host and missing below `destination`; of one run, or of all.

    `which`: all, latest, best, or a step.

    A checkpoint appears under its name only when every byte was checked. Whatever ends a fetch, the next one
    goes on from the bytes that arrived. Raises ProvisionError, after all good ones are home, where one is bad.
    """
    demand_which(which)
    if host.system != "installed":
        raise ProvisionError(
            f"{host.name} is on the install ISO; no runs are there.", f"fab -H {host.name} provision"
        )
    execs, received = host.traffic.execs, host.traffic.bytes_received
    listing = list_remote(host, machine, run)
    chosen = [listed for found in listing.runs.values() for listed in found.chosen(which)]
    if which.isdecimal() and not chosen:
        raise no_such_step(host.name, which, listing)
    missing = [listed for listed in chosen if not is_here(destination, listed)]
    beside = changed_files(destination, listing)
    bad: list[str] = []
    moved: list[Listed] = []
    try:
        if missing or beside:
            with locked(destination / ".staging") as staging:
                demand_space(destination, staging, missing)
                if missing:
                    size = human(sum(listed.size for listed in missing))
                    say(f"{len(missing)} of {len(chosen)} checkpoints are not here yet: {size}")
                wrong = bring(host, machine, staging, missing, beside)
                moved = [listed for listed in missing if not wrong & set(paths_of(listed))]
                for listed in moved:
                    settle(staging, destination, listed)
                settle_beside(staging, destination, beside)
                if wrong:
                    bad = explain_wrong(list_remote(host, machine, run), wrong)
                for name in listing.runs:
                    shutil.rmtree(staging / name, ignore_errors=True)
        set_pointers(destination, listing)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ProvisionError(
            f"The disk of {destination.resolve()} is full; every checkpoint under its own name there is whole.",
            "Make room, then run the same command again: it goes on where it stopped.",
        ) from error
    done = Fetched(
        tuple(listed.path for listed in moved),
        sum(is_here(destination, listed) for listed in chosen),
        host.traffic.execs - execs,
        host.traffic.bytes_received - received,
        any(found.at_work for found in listing.runs.values()),
    )
    if problems := [*listing.refused, *bad]:
        raise ProvisionError(
            f"{done.here} checkpoints of {host.name} are here and good; not taken:\n"
            + "\n".join(f"  {problem}" for problem in problems),
            f"On {host.name}, look at the disk: journalctl -k | grep -i error",
        )
    say(summary(host.name, destination, listing, done))
    return done


def demand_which(which: str) -> None:
    if which not in ("all", *POINTERS) and not which.isdecimal():
        raise ProvisionError(f"--which {which}: expected all, latest, best, or a step such as 2000.")


def no_such_step(name: str, which: str, listing: Listing) -> ProvisionError:
    steps = sorted({int(listed.name.removeprefix("step-")) for listed in listing.checkpoints})
    kept = ", ".join(map(str, steps)) or "none yet"
    return ProvisionError(
        f"There is no checkpoint of step {which} on {name}; it keeps those of steps {kept}.",
        "A run keeps its newest, its best, and every train.keep_every steps.",
    )


def list_remote(host: Host, machine: Machine, run: str) -> Listing:
    """One exec. Raises ProvisionError where there is no run at all, or not the one that was asked for."""
    values = variables(
        runs=f"{machine.train.folder}/runs",
        only=checked_run(run) if run else "",
        beside=" ".join(BESIDE),
        pointers=" ".join(POINTERS),
    )
    listing = parse_listing(host.look(values + AT_WORK + LIST, as_root=False, deadline_s=600).stdout)
    if not listing.runs:
        asked = f"There is no run {run} on {host.name}." if run else f"There is no run on {host.name} yet."
        raise ProvisionError(asked, f"fab -H {host.name} {'fetch-checkpoints' if run else 'train'}")
    return listing


def changed_files(destination: Path, listing: Listing) -> list[PurePosixPath]:
    """The files beside checkpoints that are not here as the host has them."""
    return [
        PurePosixPath(run.name, name)
        for run in listing.runs.values()
        for name, piece in run.files.items()
        if not matches(destination / run.name / name, piece)
    ]


def paths_of(listed: Listed) -> list[PurePosixPath]:
    return [listed.path / name for name in listed.files]


def bring(
    host: Host, machine: Machine, staging: Path, missing: Sequence[Listed], beside: Sequence[PurePosixPath]
) -> set[PurePosixPath]:
    """Move files into staging, where some may lie in part; those of checkpoints that are still wrong after it."""
    wanted = {listed.path / name: piece for listed in missing for name, piece in listed.files.items()}
    extra = list(beside)
    for path in extra:
        (staging / path).unlink(missing_ok=True)
    wrong = {path for path, piece in wanted.items() if not matches(staging / path, piece)}
    for clean in (False, True):
        if not wrong and not extra:
            break
        for path in wrong:
            # rsync adds to a file that is shorter and leaves one that is not: what is wrong there must go.
            staged = staging / path
            if staged.is_file() and (clean or staged.stat().st_size >= wanted[path].size):
                staged.unlink()
        names = "".join(f"{path}\n" for path in [*sorted(wrong), *extra])
        source = host.remote(PurePosixPath(machine.train.folder, "runs")) + "/"
        host.rsync(
            ["--files-from=-", "--partial", "--append-verify", source, f"{staging}/"],
            stdin=names,
            tolerate=RSYNC_PARTIAL,
        )
        wrong, extra = {path for path in wrong if not matches(staging / path, wanted[path])}, []
    return wrong


def explain_wrong(again: Listing, wrong: set[PurePosixPath]) -> list[str]:
    """A checkpoint that the host has pruned meanwhile is no error; one that it still lists is damaged there."""
    return [
        f"{path}: cannot be read whole there, or is not what its manifest says"
        for listed in again.checkpoints
        for path in paths_of(listed)
        if path in wrong
    ]


def settle(staging: Path, destination: Path, listed: Listed) -> None:
    """Give a checkpoint whose files are all in staging its name: synced, manifest last, renamed."""
    staged, final = staging / listed.path, destination / listed.path
    staged.mkdir(parents=True, exist_ok=True)
    for path in staged.iterdir():
        if path.name not in listed.files:
            path.unlink()
    for name in listed.files:
        sync(staged / name)
    (staged / MANIFEST).write_bytes(listed.manifest)
    sync(staged / MANIFEST)
    sync(staged)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():  # another one under this name, or one that lost a file
        (final / MANIFEST).unlink(missing_ok=True)  # from here on it does not exist
        shutil.rmtree(final)
    staged.rename(final)
    sync(final.parent)


def settle_beside(staging: Path, destination: Path, beside: Sequence[PurePosixPath]) -> None:
    """Put the files beside checkpoints in their place. One that has gone from the host meanwhile stays as it was."""
    for path in beside:
        if (staging / path).is_file():
            (destination / path).parent.mkdir(parents=True, exist_ok=True)
            sync(staging / path)
            (staging / path).replace(destination / path)


def set_pointers(destination: Path, listing: Listing) -> None:
    """Let latest and best name what they name on the host, where that is here."""
    for run in listing.runs.values():
        folder = destination / run.name / "checkpoints"
        for name, value in run.pointers.items():
            text, pointer = f"{value}\n", folder / name
            if not (folder / value / MANIFEST).is_file():
                continue
            if not pointer.is_file() or pointer.read_text(errors="replace") != text:
                staged = folder / f".{name}.partial"
                staged.write_text(text)
                sync(staged)
                staged.replace(pointer)
                sync(folder)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(staging: Path) -> Iterator[Path]:
    """The staging folder, for one fetch at a time. It stays while it holds something to go on with."""
    staging.mkdir(parents=True, exist_ok=True)
    handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ProvisionError(
                f"Another fetch into {staging.parent} is at work.", "Wait for its end."
            ) from error
        yield staging
        with suppress(OSError):
            staging.rmdir()
    finally:
        os.close(handle)


def demand_space(destination: Path, staging: Path, missing: Sequence[Listed]) -> None:
    """Raise ProvisionError where what is still to come has no room. What lies in staging has come already."""
    need_bytes = sum(listed.size for listed in missing)
    for listed in missing:
        for path in paths_of(listed):
            with suppress(OSError):
                need_bytes -= (staging / path).stat().st_size
    free_bytes = shutil.disk_usage(destination).free
    if need_bytes > free_bytes:
        raise ProvisionError(
            f"{human(need_bytes)} are to be fetched, and {destination.resolve()} has room for {human(free_bytes)}.",
            "Fetch less, with --run ID or --which latest, or make room.",
        )


def summary(name: str, destination: Path, listing: Listing, done: Fetched) -> str:
    """What a person reads at the end."""
    cost = f"{done.execs} exec{'s' * (done.execs != 1)}, {human(done.bytes_received)} received"
    if not listing.checkpoints:
        return f"No run on {name} has a complete checkpoint yet ({cost})."
    if not done.moved:
        return f"Nothing to fetch: all {done.here} checkpoints of {name} are in {destination} ({cost})."
    lines = [
        f"{len(done.moved)} fetched into {destination}, every file as its manifest says; {done.here} are here ({cost})."
    ]
    for run in listing.runs.values():
        if value := run.pointers.get("latest"):
            lines.append(f"  {destination / run.name / 'checkpoints' / value}")
    return "\n".join(lines)
