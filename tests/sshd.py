"""A real sshd on loopback that believes it is a machine, and a proxy that makes its network bad.

`Sshd` runs OpenSSH's server in mount and process namespaces of its own: private users, passwords, sudoers, /run
and boot id, /etc and /opt; nothing outside is touched, and `close` ends every process. It has no systemd: the two
scripts in tests/standin/ take its place, first on PATH. Needs root, for the namespaces.

`Proxy` relays TCP to it: with a delay, cut, or as a black hole (accepts and swallows, as a host that lost power).
"""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest

from provision.machine import Machine, load_machine
from provision.pins import fingerprint_of, live_alias, parse_key, pin

STANDIN = Path(__file__).parent / "standin"
USER = "ml"

# Runs as the first process of the namespaces, and stays as the one that reaps.
SETUP = r"""
set -eu
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/sshd /run/bin /run/home/root /run/home/ml /run/etc
mkdir -m 1777 /run/tmp
cp "$standin"/* /run/bin/
cp "$folder/authorized_keys" /run/sshd/
cp "$folder/boot_id" /run/boot_id
mount --bind /run/boot_id /proc/sys/kernel/random/boot_id
mkdir /run/etc-upper /run/etc-work
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc-upper,workdir=/run/etc-work overlay /etc
mkdir -p /etc/systemd/system
sed "s,^root:.*,root:x:0:0:root:/run/home/root:/bin/bash,; /^ml:/d" /etc/passwd >/run/etc/passwd
echo "ml:x:4242:4242::/run/home/ml:$shell" >>/run/etc/passwd
{ grep -v '^ml:' /etc/group; echo 'ml:x:4242:'; } >/run/etc/group
{ echo "root:$password:19000::::::"; echo 'ml:*:19000::::::'; } >/run/etc/shadow
printf '%s\n' 'Defaults secure_path="/run/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"' \
    'root ALL=(ALL) ALL' "$sudoer" >/run/etc/sudoers
chmod 440 /run/etc/sudoers
for name in passwd group shadow sudoers; do mount --bind "/run/etc/$name" "/etc/$name"; done
chown 4242:4242 /run/home/ml
# This very Python as the machine's environment; its base may lie in a home that only root may enter.
mkdir /run/upper /run/work
mount -t overlay -o lowerdir=/opt,upperdir=/run/upper,workdir=/run/work overlay /opt
rm -rf /opt/metal
mkdir -p /opt/metal/envs/here
mount --bind "$prefix" /opt/metal/envs/here
ln -s /opt/metal/envs/here /opt/metal/env
case $base in /root/*)
  mkdir /run/base
  mount --bind "$base" /run/base
  mount -t tmpfs -o mode=755 tmpfs /root
  mkdir -p "$base"
  mount --bind /run/base "$base";;
esac
touch /run/ready
while :; do sleep 1000 & wait $!; done
"""

CONFIG = """
ListenAddress {address}
Port {port}
HostKey {folder}/host_key
PidFile {folder}/sshd.pid
AuthorizedKeysFile /run/sshd/authorized_keys
UsePAM no
PermitRootLogin yes
PasswordAuthentication yes
StrictModes no
UseDNS no
MaxStartups 100
LogLevel ERROR
SetEnv TMPDIR=/run/tmp PATH=/run/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
Subsystem sftp internal-sftp
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def keygen(path: Path, kind: str = "ed25519") -> Path:
    path.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "", "-f", path], check=True)
    return path


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = 20) -> None:
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until, f"waited {deadline_s} s for {what}"
        time.sleep(0.02)


class Sshd:
    """The server, its keys and its machine. `password`: root's, "" for none. `shell`: that of the user.

    It listens on `address`, in the network namespace `netns` where one is named (`ip netns add`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        shell: str = "/bin/bash",
        password: str = "",
        sudoer: str = f"{USER} ALL=(ALL) NOPASSWD: ALL",
        address: str = "127.0.0.1",
        netns: str = "",
    ) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root: the private sshd lives in namespaces of its own")
        assert shutil.which("sshd", path="/usr/sbin:/usr/bin"), "there is no sshd: install openssh-server"
        self.folder = folder
        self.address = address
        self.extra_config = ""
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.identity = keygen(folder / "identity")
        self.public_key = (folder / "identity.pub").read_text().strip()
        (folder / "authorized_keys").write_text(self.public_key + "\n")
        (folder / "boot_id").write_text("boot-1\n")
        keygen(folder / "host_key")
        hashed = subprocess.run(
            ["openssl", "passwd", "-6", password], capture_output=True, text=True, check=True
        )
        settings = {
            "folder": folder,
            "standin": STANDIN,
            "shell": shell,
            "password": hashed.stdout.strip() if password else "*",
            "sudoer": sudoer,
            "prefix": sys.prefix,
            "base": sys.base_prefix,
        }
        assignments = "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in settings.items())
        within = ["ip", "netns", "exec", netns] if netns else []
        first = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c"]
        with (folder / "setup.log").open("wb") as log:
            self.holder = subprocess.Popen(
                [*within, *first, assignments + SETUP],
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        wait_for(self._is_ready, "the namespaces")
        self.start()

    def _is_ready(self) -> bool:
        if self.holder.poll() is not None:
            raise AssertionError("the namespaces were not made: " + (self.folder / "setup.log").read_text())
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()
        if not children:
            return False
        self.init = int(children[0])
        return self.path("/run/ready").exists()

    def path(self, inside: str) -> Path:
        """A path of the machine as seen from the test."""
        return Path(f"/proc/{self.init}/root{inside}")

    def inside(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespaces, as root, past SSH."""
        return subprocess.run(
            ["nsenter", "-t", str(self.init), "-m", "-p", "-n", "--", *argv],
            capture_output=True,
            text=True,
            check=False,
        )

    # The server

    def start(self) -> None:
        config = CONFIG.format(port=self.port, folder=self.folder, address=self.address) + self.extra_config
        (self.folder / "sshd_config").write_text(config)
        done = self.inside(
            "/usr/sbin/sshd", "-f", str(self.folder / "sshd_config"), "-E", str(self.folder / "sshd.log")
        )
        assert done.returncode == 0, done.stderr
        wait_for(self._listens, "sshd")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.address, self.port)) == 0

    def stop_listening(self) -> None:
        """End the server and every session; what runs detached on the machine goes on."""
        self.drop_connections()
        self.inside("kill", (self.folder / "sshd.pid").read_text().strip())
        wait_for(lambda: not self._listens(), "sshd to end")

    def sessions(self) -> list[str]:
        """The process ids, as the machine sees them, of what serves the open connections."""
        server = (self.folder / "sshd.pid").read_text().strip()
        return [pid for pid in self.inside("pgrep", "-x", "sshd").stdout.split() if pid != server]

    def drop_connections(self) -> None:
        self.inside("kill", "-KILL", *self.sessions())

    def restart(self) -> None:
        self.stop_listening()
        self.start()

    def swap_host_key(self) -> None:
        """Answer with a new host key from now on, as another machine would."""
        keygen(self.folder / "host_key")
        self.restart()

    def set_boot_id(self, text: str) -> None:
        self.path("/run/boot_id").write_text(text + "\n")

    def close(self) -> None:
        """End everything: the first process of a PID namespace takes all others with it."""
        os.kill(self.init, signal.SIGKILL)
        self.holder.wait(10)

    # How to reach it

    @property
    def host_key(self) -> str:
        return parse_key((self.folder / "host_key.pub").read_text())

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.host_key)

    @property
    def pins(self) -> Path:
        return self.folder / "machines" / "known_hosts"

    def pin(self, *, live: bool = False, name: str = "box") -> None:
        """Trust the present host key as that of the installed system, or of the ISO."""
        pin(self.pins, live_alias(name) if live else name, self.host_key)

    def machine(self, *, name: str = "box", port: int = 0, identity: bool = True) -> Machine:
        """A machine whose files say how to reach this server (or a proxy at `port`)."""
        folder = self.folder / "machines"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.toml").write_text(
            f'[disk]\nserial = "none"\n[user]\nauthorized_keys = ["{self.public_key}"]\n'
            f'[ssh]\naddress = "{self.address}"\nport = {port or self.port}\n'
        )
        machine = load_machine(name, folder)
        return (
            replace(machine, ssh=replace(machine.ssh, identity=str(self.identity))) if identity else machine
        )


class Proxy:
    """Relays TCP from a port of its own. `delay_s` each way. Modes: open, `cut()`, `swallow()`.

    With `cut_after_bytes` it cuts by itself, once so many have come through.
    """

    def __init__(self, target: int, *, delay_s: float = 0, address: str = "127.0.0.1", port: int = 0) -> None:
        self.target = target
        self.delay_s = delay_s
        self.cut_after_bytes = 0
        self.swallowing = False
        self.accepting = True
        self.accepted = 0
        self.relayed_bytes = 0
        self.sockets: list[socket.socket] = []
        self.lock = threading.Lock()
        self.listener = socket.create_server((address, port))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow(self) -> None:
        """Become a black hole: connections stay open, and nothing comes through any more."""
        self.swallowing = True

    def cut(self, *, accept: bool = True) -> None:
        """Close every connection; with `accept=False` also every new one, until `mend`."""
        self.accepting = accept
        with self.lock:  # not those that dial again while these are hung up
            doomed, self.sockets = self.sockets, []
        for sock in doomed:
            hang_up(sock)

    def mend(self) -> None:
        self.swallowing, self.accepting = False, True

    def close(self) -> None:
        hang_up(self.listener)
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            if not self.accepting:
                near.close()
                continue
            self.accepted += 1
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.lock:  # from here on another thread may close them
                self.sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                chunks: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
                threading.Thread(target=self._read, args=(source, chunks), daemon=True).start()
                threading.Thread(target=self._write, args=(sink, chunks), daemon=True).start()

    def _read(self, source: socket.socket, chunks: "SimpleQueue[tuple[float, bytes]]") -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            self.relayed_bytes += len(data)
            if self.cut_after_bytes and self.relayed_bytes > self.cut_after_bytes:
                self.cut_after_bytes = 0
                self.cut()
            chunks.put((time.monotonic() + self.delay_s, data))

    def _write(self, sink: socket.socket, chunks: "SimpleQueue[tuple[float, bytes]]") -> None:
        while True:
            due, data = chunks.get()
            if self.swallowing:
                if not data:
                    return
                continue
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
            except OSError:
                return


def hang_up(sock: socket.socket) -> None:
    """Close a socket that another thread may be blocked in."""
    with contextlib.suppress(OSError):  # not connected any more
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    """A private sshd; its user is `ml`, who may sudo without a password."""
    server = Sshd(tmp_path / "sshd")
    yield server
    server.close()


@pytest.fixture
def proxy(sshd: Sshd) -> Iterator[Proxy]:
    """A relay to `sshd` that a test may delay, cut or turn into a black hole."""
    relay = Proxy(sshd.port)
    yield relay
    relay.close()
