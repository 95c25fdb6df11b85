"""One authenticated SSH connection: commands over raw channels, and a watch that notices a vanished host.

Why not `Connection.run`: it feeds stdin a byte every 10 ms, re-joins all of stdout every 1000 bytes, and
waits for ever on a host that vanished. Here three threads move the three streams, and the caller's thread
hands out what arrives, so callbacks run there and Ctrl-C lands there.
"""

import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import paramiko
from fabric import Connection

from provision.errors import ConnectionLost, ProvisionError

BEAT_S = 5.0  # between two questions whether the host is still there
SILENCE_S = 20.0  # without an answer: the connection is given up, at most BEAT_S + SILENCE_S after it went
TICK_S = 0.5  # how late a deadline may be noticed
LINGER_S = 1.0  # for more output after the exit status, when a child in the background keeps it open
CHUNK_BYTES = 1 << 16

Sink = Callable[[bytes], object]

# What the login shell (bash, zsh, fish, csh) gets: no quote, backslash or exclamation mark may appear in it.
# `read` takes a pipe byte by byte and `head -c` stops at the byte, so what follows the script on stdin is the
# script's own stdin. A script that did not arrive whole does not start. The mark separates our output from
# what the login shell's start files printed.
BOOTSTRAP = (
    'export LC_ALL=C; read -r mark size && script=$(head -c "$size") && [ "${#script}" -eq "$size" ]'
    ' || { echo "the script did not arrive whole" >&2; exit 1; };'
    ' echo "$mark"; echo "$mark" >&2; set -euo pipefail; eval "$script"'
)
BASH = f"bash --norc --noprofile -c '{BOOTSTRAP}' metal"


@dataclass
class Traffic:
    """What one Host cost so far: commands started, bytes of payload (scripts and data; not SSH's own)."""

    execs: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def __str__(self) -> str:
        return f"{self.execs} execs, {self.bytes_sent:,} bytes sent, {self.bytes_received:,} received"


class AfterMark:
    """Passes on what comes after the line that ends in the mark; keeps what came before, for an error."""

    def __init__(self, mark: bytes, sink: Sink) -> None:
        self.mark = mark + b"\n"
        self.sink = sink
        self.seen = False
        self.before = b""

    def __call__(self, data: bytes) -> None:
        if not self.seen:
            self.before += data
            before, found, data = self.before.partition(self.mark)
            if not found:
                return
            self.seen, self.before = True, before
        if data:
            self.sink(data)


class Link:
    """An open `fabric.Connection` and the threads that watch it. Closed once, never opened again."""

    def __init__(
        self,
        connection: Connection,
        name: str,
        traffic: Traffic,
        *,
        beat_s: float = BEAT_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.connection = connection
        self.transport: paramiko.Transport = connection.transport
        self.name = name
        self.traffic = traffic
        self.beat_s = beat_s
        self.silence_s = silence_s
        self.heard_at = time.monotonic()
        self.asked_at: float | None = None  # None: no question is open
        self.silent = False
        self.stopping = threading.Event()
        for task in (self._ask, self._guard):
            threading.Thread(target=task, name=f"heartbeat {name}", daemon=True).start()

    @property
    def alive(self) -> bool:
        return bool(self.transport.is_active())

    def close(self) -> None:
        self.stopping.set()
        hang_up(self.connection)

    def _ask(self) -> None:
        """Ask every beat. sshd answers a global request that it does not know with a failure: an answer."""
        while not self.stopping.wait(self.beat_s) and self.alive:
            self.asked_at = time.monotonic()
            try:
                self.transport.global_request("keepalive@openssh.com", wait=True)  # waits for ever
            except (OSError, EOFError, paramiko.SSHException):
                return  # the connection ended; whoever uses it gets told
            self.heard_at = time.monotonic()
            self.asked_at = None

    def _guard(self) -> None:
        """Close a connection on which neither the answer nor anything else comes: that wakes all who wait on it."""
        while not self.stopping.wait(min(self.beat_s, self.silence_s) / 4) and self.alive:
            asked_at = self.asked_at
            if asked_at is not None and time.monotonic() - max(asked_at, self.heard_at) >= self.silence_s:
                self.silent = True
                self.transport.close()

    def lost(self) -> ConnectionLost:
        why = f"did not answer for {self.silence_s:g} s" if self.silent else "closed the connection"
        return ConnectionLost(
            f"{self.name} {why}. Whether the script that ran there finished is not known.",
            "Run the same command again: it looks at what is there and goes on.",
        )

    def bash(
        self,
        script: str,
        data: bytes,
        out: Sink,
        err: Sink,
        *,
        prefix: str = "",
        what: str,
        deadline_s: float | None,
    ) -> int:
        """Run a bash script whose stdin is `data`; its output goes to `out` and `err` as it comes.

        `prefix` goes before `bash`, such as `sudo -n`. Returns the exit status.
        Raises ConnectionLost, and ProvisionError where bash did not start or the deadline passed.
        """
        mark = secrets.token_hex(16)
        body = script.encode() + b"\n#"  # $(…) would strip the newlines at the end
        if b"\0" in body:
            raise ValueError("a script cannot hold a NUL byte")
        payload = b"%s %d\n%s%s" % (mark.encode(), len(body), body, data)
        stdout, stderr = AfterMark(mark.encode(), out), AfterMark(mark.encode(), err)
        code = self._execute(
            f"exec {prefix}{BASH}", payload, stdout, stderr, what=what, deadline_s=deadline_s
        )
        if not stdout.seen:
            said = (stderr.before or stdout.before).decode(errors="replace").strip()
            raise ProvisionError(
                f"{self.name}: bash could not be started (status {code}): {said[-2000:]}", not_started(said)
            )
        return code

    def _execute(
        self, command: str, payload: bytes, out: Sink, err: Sink, *, what: str, deadline_s: float | None
    ) -> int:
        started = time.monotonic()
        arrived: SimpleQueue[tuple[Sink, bytes]] = SimpleQueue()
        self.traffic.execs += 1
        try:
            channel = self.transport.open_session()
            channel.exec_command(command)
        except paramiko.ChannelException as error:
            raise ProvisionError(f"{self.name} does not start another command: {error.text}.") from error
        except (OSError, EOFError, paramiko.SSHException) as error:
            self.close()
            raise self.lost() from error
        for target, args in (
            (self._send, (channel, payload)),
            (self._receive, (channel.recv, out, arrived)),
            (self._receive, (channel.recv_stderr, err, arrived)),
        ):
            threading.Thread(target=target, args=args, name=f"{what} {self.name}", daemon=True).start()
        try:
            streams, heard = 2, time.monotonic()
            while streams or not channel.status_event.is_set():
                if deadline_s is not None and time.monotonic() - started > deadline_s:
                    raise ProvisionError(f"{self.name}: {what} was not done after {deadline_s:g} s.")
                try:
                    sink, data = arrived.get(timeout=TICK_S if streams else 0.02)
                except Empty:
                    # Only while nothing is waiting: a slow sink must not look like a silent host.
                    if channel.status_event.is_set() and time.monotonic() - heard > LINGER_S:
                        break
                    continue
                streams -= not data
                if data:
                    sink(data)
                heard = time.monotonic()
            return self._status(channel, what)
        finally:
            channel.close()

    def _status(self, channel: paramiko.Channel, what: str) -> int:
        """The exit status; where there is none, the connection went or a signal ended the command."""
        if channel.exit_status >= 0:
            return int(channel.exit_status)
        self.transport.join(1.0)  # its last act is to mark itself as inactive
        if not self.alive:
            raise self.lost()
        raise ProvisionError(f"{self.name}: {what} was killed on the host (no exit status; out of memory?).")

    def _send(self, channel: paramiko.Channel, payload: bytes) -> None:
        try:
            for start in range(0, len(payload), CHUNK_BYTES):
                chunk = payload[start : start + CHUNK_BYTES]
                channel.sendall(chunk)
                self.traffic.bytes_sent += len(chunk)
            channel.shutdown_write()
        except (OSError, EOFError):
            pass  # the command ended without reading it all, or the connection did: the status tells which

    def _receive(
        self, recv: Callable[[int], bytes], sink: Sink, arrived: "SimpleQueue[tuple[Sink, bytes]]"
    ) -> None:
        data = b"-"
        while data:
            try:
                data = recv(CHUNK_BYTES)
            except (OSError, EOFError):
                data = b""
            if data:
                self.heard_at = time.monotonic()
                self.traffic.bytes_received += len(data)
            arrived.put((sink, data))


def not_started(said: str) -> str:
    """What to do when the host's bash did not come up, by what it printed."""
    if "sudo" in said:
        return "The user must be able to run `sudo -n true`: give it NOPASSWD in /etc/sudoers.d."
    return "bash, head and sudo must be on the host's PATH."


def no_delay(sock: object) -> None:
    """Without it every small packet waits for the acknowledgement of the one before (about 40 ms an exec)."""
    if isinstance(sock, socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def hang_up(connection: Connection) -> None:
    """Close it and what it goes through. `Connection.close` leaves a transport whose login failed running."""
    connection.client.close()
    if isinstance(connection.gateway, Connection):
        hang_up(connection.gateway)
