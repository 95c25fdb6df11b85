"""Files to a host in one exec each, and rsync with the same pinned keys. What arrives is checked, then renamed."""

import hashlib
import io
import re
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from provision.errors import ConnectionLost, ProvisionError
from provision.units import variables

# The data is the script's stdin. A connection that is lost in the middle looks like its end: hence the hash.
RECEIVE = r"""
umask 077
temporary=$(mktemp -- "${target%/*}/.${target##*/}.XXXXXX")
trap 'rm -rf -- "$temporary" "$temporary.d"' EXIT
cat >"$temporary"
[ "$(sha256sum <"$temporary")" = "$sha256  -" ] || { echo "$target did not arrive whole" >&2; exit 1; }
"""
PUT = r"""
chmod "$mode" -- "$temporary"
sync -- "$temporary"
if [ -e "$target" ]; then chown --reference="$target" -- "$temporary"; fi
mv -T -- "$temporary" "$target"
"""
UNPACK = r"""
mkdir -- "$temporary.d"
tar -xmf "$temporary" -C "$temporary.d" --no-same-owner --no-same-permissions
chmod -R u=rwX,go=rX -- "$temporary.d"
if [ -e "$target" ]; then mv -T -- "$target" "$temporary.old"; fi
mv -T -- "$temporary.d" "$target"
rm -rf -- "$temporary.old"
"""


def put_script(data: bytes, target: PurePosixPath, mode: int) -> str:
    """Write stdin to `target`, whose folder exists. A file that is there keeps its owner."""
    sha256 = hashlib.sha256(data).hexdigest()
    return variables(target=absolute(target), mode=f"{mode:o}", sha256=sha256) + RECEIVE + PUT


def tree_script(packed: bytes, target: PurePosixPath) -> str:
    """Unpack the tar on stdin as folder `target`, instead of what is there; makes the folders above it."""
    sha256 = hashlib.sha256(packed).hexdigest()
    values = variables(target=absolute(target), sha256=sha256)
    return values + 'mkdir -p -- "${target%/*}"\n' + RECEIVE + UNPACK


def absolute(target: PurePosixPath) -> PurePosixPath:
    if not target.is_absolute() or target == PurePosixPath("/"):
        raise ValueError(f"not an absolute path below /: {target}")
    return target


def pack(files: Mapping[str, bytes]) -> bytes:
    """A tar, the same bytes for the same files on every machine."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(files[name]), 0o644
            tar.addfile(entry, io.BytesIO(files[name]))
    return packed.getvalue()


@dataclass(frozen=True)
class Rsync:
    """How OpenSSH and rsync reach a host: the same pin, a key (`key_file`; "" is the agent's)."""

    name: str
    alias: str
    pins: Path
    port: int
    user: str
    key_file: str

    def ssh(self) -> list[str]:
        options = {
            "UserKnownHostsFile": quoted(self.pins.resolve()),
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": self.alias,
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": "15",
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "4",
            "LogLevel": "ERROR",
        }
        if self.key_file:
            options |= {"IdentitiesOnly": "yes", "IdentityFile": quoted(Path(self.key_file).resolve())}
        argv = ["ssh", "-p", str(self.port), "-l", self.user]
        return [*argv, *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]

    def argv(self, arguments: Sequence[str]) -> list[str]:
        # rsync splits -e at spaces and knows quotes of its own, as ssh does within -o
        remote_shell = " ".join(f"'{word}'" if " " in word else word for word in self.ssh())
        return ["rsync", "-e", remote_shell, "--stats", "--no-human-readable", *arguments]


def quoted(path: Path) -> str:
    """A path as the value of an ssh option."""
    if re.search(r"['\"\n%]", str(path)):
        raise ProvisionError(f"ssh cannot be given the path {path}: it holds a quote or a percent sign.")
    return f'"{path}"'


def run_rsync(
    how: Rsync, arguments: Sequence[str], stdin: str, deadline_s: float, tolerate: Sequence[int]
) -> tuple[int, int]:
    """Run it; (bytes sent, bytes received). Raises ProvisionError with rsync's own words."""
    if not shutil.which("rsync"):
        raise ProvisionError("There is no rsync on this machine.", "apt install rsync, or pacman -S rsync")
    argv = how.argv(arguments)
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise ConnectionLost(
            f"{how.name}: rsync was not done after {deadline_s:g} s.",
            "Run the same command again: it goes on.",
        ) from error
    if done.returncode and done.returncode not in tolerate:
        raise explain_rsync(how, done.returncode, done.stderr, shlex.join(argv))
    counts = [re.search(rf"^Total bytes {way}: (\d+)", done.stdout, re.M) for way in ("sent", "received")]
    sent, received = (int(match[1]) if match else 0 for match in counts)
    return sent, received


def explain_rsync(how: Rsync, code: int, stderr: str, command: str) -> ProvisionError:
    """rsync(1), EXIT VALUES: 12 and 30 are a broken stream and silence, 255 is ssh's own, 127 no rsync there."""
    said = "\n".join(stderr.strip().splitlines()[-8:])
    if code == 127 or "rsync: command not found" in stderr or "rsync: not found" in stderr:
        return ProvisionError(f"There is no rsync on {how.name}.", f"On {how.name}: sudo pacman -S rsync")
    message = f"rsync from {how.name} ended with status {code}:\n{said}"
    if "Host key verification failed" in stderr or "HOST IDENTIFICATION HAS CHANGED" in stderr:
        return ProvisionError(message, f"{how.pins} holds the key of {how.alias}; the host presents another.")
    if "No space left on device" in stderr or "Disk quota exceeded" in stderr:
        return ProvisionError(
            f"The disk is full; what arrived stays usable. rsync says:\n{said}",
            "Make room, then run the same command again: it goes on where it stopped.",
        )
    if code in (10, 12, 20, 30, 35, 255):
        return ConnectionLost(message, "Run the same command again: it goes on where it stopped.")
    return ProvisionError(message, f"The command was: {command}")


def human(size_bytes: int) -> str:
    """Bytes in the unit that people read: 1.2 GB."""
    size, units = float(size_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def hash_file(path: Path) -> str:
    """sha256 of its content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
