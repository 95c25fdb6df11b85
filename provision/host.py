"""The one SSH session to a machine: run a script, put files, start what outlives the connection, find it again.

Round trips are the cost (an exec each), so a Host has no small methods such as "exists": a caller sends one
script that does it all.
"""

import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType

from provision.dial import Confirm, Dialled, Wanted, dial
from provision.errors import (
    ConnectionLost,
    ProvisionError,
    ScriptFailed,
    Unreachable,
)
from provision.link import BEAT_S, SILENCE_S, Link, Sink, Traffic
from provision.machine import Machine
from provision.pins import SystemName, live_alias
from provision.transfer import Rsync, pack, put_script, run_rsync, tree_script
from provision.units import Following, OnLine, folder_of, follow_script, start_script, unit_name

__all__ = ["Host", "Result", "Traffic", "connect"]

LAST_LINES = 20  # of output, in an error message
AWAY_S = 90.0  # for how long one that went away is dialled, where nothing was begun on it or all can be asked again
RECONNECT_S = 3600.0  # for how long a machine that went away is dialled, where a follower has no deadline
BACKOFF_S = (0.5, 1, 2, 4, 8, 15)  # between two attempts to dial
TIMED_OUT = 124  # timeout(1)

Progress = Callable[[str], None]


def say_nothing(line: str) -> None:
    """The progress of a caller who does not want to hear of it."""


@dataclass(frozen=True)
class Result:
    """How a script ended: exit status, and its output decoded as UTF-8 (what is not becomes U+FFFD)."""

    code: int
    stdout: str
    stderr: str


class Host:
    """An open session. A connection that is lost is opened anew by the next call, to the same system only.

    `system` is "live" (the ISO, as root) or "installed" (as the machine's user, who may `sudo -n`).
    `traffic` counts over all connections. Not for use by several threads at once.
    """

    def __init__(
        self,
        wanted: Wanted,
        *,
        progress: Progress = say_nothing,
        beat_s: float = BEAT_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.wanted = wanted
        self.name = wanted.machine.name
        self.progress = progress
        self.beat_s, self.silence_s = beat_s, silence_s
        self.traffic = Traffic()
        self._open()
        self.wanted = replace(wanted, only=self.system, confirm=None)

    def _open(self) -> None:
        dialled: Dialled = dial(self.wanted)
        self.user = dialled.user
        self.system: SystemName = dialled.system
        self.address = str(dialled.connection.host)
        self.port = int(dialled.connection.port)
        self.peer = peer_of(dialled)
        self.login = dialled
        self.link = Link(
            dialled.connection, self.name, self.traffic, beat_s=self.beat_s, silence_s=self.silence_s
        )

    def __enter__(self) -> "Host":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.link.close()

    def reconnect(self) -> None:
        """Dial again. Raises Refused where another system, or nobody whom we know, answers."""
        self.link.close()
        self._open()

    def run(
        self,
        script: str,
        *,
        deadline_s: float = 60,
        check: bool = True,
        as_root: bool = True,
        stdin: bytes = b"",
    ) -> Result:
        """One exec of a bash script (`set -euo pipefail`, LC_ALL=C) of any length; `stdin` is what it reads.

        The host itself ends a script, and what it started, at the deadline. Raises ScriptFailed (`check`) on a
        status other than 0, ConnectionLost when it is not known how the script ended, else ProvisionError.
        """
        out: list[bytes] = []
        err: list[bytes] = []
        started = time.monotonic()
        code = self._bash(
            script,
            stdin,
            out.append,
            err.append,
            as_root=as_root,
            limit=f"timeout -k 5 {deadline_s:g} ",
            what="the script",
            deadline_s=deadline_s + 10,
        )
        result = Result(code, b"".join(out).decode(errors="replace"), b"".join(err).decode(errors="replace"))
        if code == TIMED_OUT and time.monotonic() - started >= deadline_s:
            raise ProvisionError(
                f"{self.name}: the script was not done after {deadline_s:g} s and was ended there.\n"
                + last_lines(result.stdout + result.stderr)
            )
        if check and code:
            said = last_lines(result.stderr if result.stderr.strip() else result.stdout)
            raise ScriptFailed(f"{self.name}: the script ended with status {code}:\n{said}", code=code)
        return result

    def look(self, script: str, *, deadline_s: float = 60, as_root: bool = True) -> Result:
        """`run` of a script that only reads: where the connection is lost in it, it is dialled and asked again."""
        until = time.monotonic() + deadline_s + AWAY_S
        while True:
            try:
                return self.run(script, deadline_s=deadline_s, as_root=as_root)
            except ConnectionLost as error:
                if time.monotonic() > until:
                    raise
                self.progress(f"{error.message.split('. ')[0]}; dialling again")

    def run_again(self, script: str, *, stdin: bytes = b"", as_root: bool = True) -> Result:
        """`run` of a script that may run twice: sent once more when the connection breaks in it."""
        try:
            return self.run(script, stdin=stdin, as_root=as_root)
        except ConnectionLost:
            self._dial_until(time.monotonic() + 60)
            return self.run(script, stdin=stdin, as_root=as_root)

    def _bash(
        self,
        script: str,
        stdin: bytes,
        out: Sink,
        err: Sink,
        *,
        as_root: bool,
        what: str,
        deadline_s: float | None,
        limit: str = "",
    ) -> int:
        if not self.link.alive:  # nothing was sent yet, so dialling again is safe
            self._dial_until(time.monotonic() + AWAY_S)
        sudo = "sudo -n " if as_root and self.user != "root" else ""
        return self.link.bash(script, stdin, out, err, prefix=sudo + limit, what=what, deadline_s=deadline_s)

    def boot_id(self) -> str:
        """Changes with every boot (random(4))."""
        return self.run("cat /proc/sys/kernel/random/boot_id", as_root=False).stdout.strip()

    # Units

    def run_unit(
        self,
        unit: str,
        script: str,
        *,
        on_line: OnLine,
        deadline_s: float,
        properties: Sequence[str] = (),
        user: str = "",
    ) -> int:
        """Run a script as the transient unit `unit` and follow its log; the exit status of the script.

        The unit goes on when the connection, this process or the laptop ends; the next call with the same
        script joins it. While another script runs under that name, that one is followed to its end first.
        Ctrl-C stops the following only.
        """
        folder, until = folder_of(unit), time.monotonic() + deadline_s
        while True:
            found = self.start_unit(unit, script, folder=folder, properties=properties, user=user)
            if found != "started":
                self.progress(f"{unit} is running already; following it")
            left_s = max(1.0, until - time.monotonic())
            code = self.follow(folder / "log", unit, on_line=on_line, deadline_s=left_s)
            if found != "other":
                return code
            self.progress(f"{unit} was running another script, which has ended with status {code}; now ours")

    def start_unit(
        self,
        unit: str,
        script: str,
        *,
        folder: PurePosixPath,
        properties: Sequence[str] = (),
        user: str = "",
    ) -> str:
        """`started`, `same` or `other`; see `start_script`."""
        start = start_script(
            unit,
            script,
            token=secrets.token_hex(8),
            folder=folder,
            user=user,
            properties=properties,
        )
        return self.run_again(start, stdin=script.encode()).stdout.strip()

    def follow(
        self,
        log: PurePosixPath,
        unit: str,
        *,
        on_line: OnLine,
        deadline_s: float | None,
        offset: int = 0,
        as_root: bool = True,
    ) -> int:
        """Hand out the lines of a unit's log from byte `offset` on until the unit ends; its exit status.

        The status is the file `status` beside the log. Dials again after a lost connection and goes on at the
        same byte. Raises ProvisionError where the unit ended without a status, and at the deadline.
        """
        until = None if deadline_s is None else time.monotonic() + deadline_s
        following = Following(on_line, offset)
        while True:
            try:
                if self._follow_once(log, unit, following, until, as_root):
                    return following.finish(unit, self.name)
            except ConnectionLost as error:
                self.progress(f"{error.message.split('. ')[0]}; {unit} goes on there. Dialling again")
                self._dial_until(until or time.monotonic() + RECONNECT_S)
                self.progress(f"{self.name} is back; going on at byte {following.offset} of the log")

    def _follow_once(
        self, log: PurePosixPath, unit: str, following: Following, until: float | None, as_root: bool
    ) -> bool:
        """Follow over one connection. True when the unit has ended, False when the host's side was stopped."""
        following.reconnected()
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            raise still_running(self.name, unit)
        script = follow_script(unit, log, following.offset)
        try:
            code = self._bash(
                script, b"", following.log, following.control, as_root=as_root, what=unit, deadline_s=left
            )
        except ConnectionLost:
            raise
        except ProvisionError as error:
            if until is not None and time.monotonic() >= until:
                raise still_running(self.name, unit) from error
            raise
        if code:
            raise ScriptFailed(f"{self.name}: the log {log} cannot be followed (status {code}).", code=code)
        return following.code is not None or following.gone is not None

    def _dial_until(self, until: float) -> None:
        """Dial again and again. A host that refuses us will go on refusing: only silence is worth a retry."""
        started = time.monotonic()
        attempt = 0
        while True:
            try:
                return self.reconnect()
            except (Unreachable, ConnectionLost) as error:
                pause = BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)]
                if time.monotonic() + pause > until:
                    waited = time.monotonic() - started
                    raise Unreachable(
                        f"{self.name} went away and was not back after {waited:.0f} s: {error.message}",
                        error.hint,
                    ) from error
                time.sleep(pause)
                attempt += 1

    # Files

    def put(
        self, source: Path | bytes, target: PurePosixPath, *, mode: int = 0o644, as_root: bool = True
    ) -> None:
        """Write one file: checked by hash, then renamed. Its folder exists; a file there keeps its owner."""
        data = source if isinstance(source, bytes) else source.read_bytes()
        self.run(put_script(data, target, mode), stdin=data, as_root=as_root, deadline_s=600)

    def send_tree(self, files: Mapping[str, bytes], target: PurePosixPath, *, as_root: bool = True) -> None:
        """Make `target` a folder with exactly these files (relative path → content), in one exec."""
        packed = pack(files)
        self.run(tree_script(packed, target), stdin=packed, as_root=as_root, deadline_s=600)

    def rsync(
        self,
        arguments: Sequence[str],
        *,
        stdin: str = "",
        deadline_s: float = 24 * 3600,
        tolerate: Sequence[int] = (),
    ) -> None:
        """rsync over OpenSSH with the same pin and key; `arguments` hold paths as `self.remote(path)`.

        `tolerate`: statuses of rsync that the caller looks into. Raises ConnectionLost, or ProvisionError.
        """
        if self.login.by == "the password":
            raise ProvisionError(
                f"rsync cannot use the password that {self.name} was reached with; it needs a key.",
                f"ssh-copy-id -p {self.port} {self.user}@{self.address}",
            )
        how = Rsync(
            name=self.name,
            alias=self.name if self.system == "installed" else live_alias(self.name),
            pins=self.wanted.pins,
            port=self.port,
            user=self.user,
            key_file=self.login.key_file,
        )
        self.traffic.execs += 1
        sent, received = run_rsync(how, arguments, stdin, deadline_s, tolerate)
        self.traffic.bytes_sent += sent
        self.traffic.bytes_received += received

    def remote(self, path: PurePosixPath) -> str:
        """A path on this host as an argument of rsync. IPv6 addresses need the brackets.

        The name as the machine file has it and not what it resolved to: ~/.ssh/config may know a jump for it.
        """
        name = self.wanted.host
        return f"[{name}]:{path}" if ":" in name else f"{name}:{path}"


def peer_of(dialled: Dialled) -> str:
    """The IP address at the other end; "" where the connection goes through another host or a command."""
    sock = dialled.connection.transport.sock
    return str(sock.getpeername()[0]) if isinstance(sock, socket.socket) else ""


def connect(
    machine: Machine,
    pins: Path,
    *,
    fingerprint: str = "",
    password: str = "",
    key_files: Sequence[str] = (),
    confirm: Confirm | None = None,
    timeout_s: float = 15,
    progress: Progress = say_nothing,
) -> Host:
    """Open the session. Whose host key is accepted decides who logs in, and where.

    The key pinned as NAME: the installed system, as the machine's user. Pinned as NAME.live, or equal to
    `fingerprint`, or confirmed by a person (then pinned as NAME.live): the ISO, as root. Any other: UnknownKey.
    """
    wanted = Wanted(machine, pins, fingerprint, password, tuple(key_files), confirm, timeout_s)
    try:
        return Host(wanted, progress=progress)
    except Unreachable:
        if confirm is None or fingerprint:
            raise
        # sshd hangs up after LoginGraceTime (120 s), and a person who walks to the console is slower. If they
        # said yes, the key is pinned by now, and the second handshake asks nobody.
        return Host(replace(wanted, confirm=None), progress=progress)


def still_running(name: str, unit: str) -> ProvisionError:
    return ProvisionError(
        f"{name}: {unit} has not ended within the time that was given; it is left running.",
        f"On {name}: systemctl status {unit_name(unit)}",
    )


def last_lines(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-LAST_LINES:])
