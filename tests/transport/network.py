"""Two machines in network namespaces of their own, each with a private sshd, and a cable between them.

    test ── 10.81.N.0/30 ── eth0 of anna        cable of anna ── 10.82.N.0/24 ── cable of berta
    test ── 10.81.N.4/30 ── eth0 of berta

As in real life the way to a machine is not the way between machines, both have a card without a cable under the same
address (a bridge of containers), and they do not know each other's names.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from provision.host import Host
from tests.sshd import Sshd
from tests.transport.trainer import installed

NAMES = ("anna", "berta")


@dataclass(frozen=True)
class Pair:
    """The machines by name; `number` makes their networks differ from those of another test at work."""

    number: int
    servers: dict[str, Sshd]
    hosts: dict[str, Host]

    def ip(self, name: str, *words: str) -> str:
        """`ip` inside of a machine."""
        return ip("-n", namespace(name), *words)

    def reach(self, name: str) -> Host:
        """A session of its own, as a task's `reach` gives it."""
        return Host(self.hosts[name].wanted)

    def write_machines(self, folder: Path) -> Path:
        """One folder of machine files for both, as fab is given it."""
        folder.mkdir()
        for name, server in self.servers.items():
            own = server.folder / "machines"
            shutil.copy(own / f"{name}.toml", folder)
            (folder / f"{name}.local.toml").write_text(f'[ssh]\nidentity = "{server.identity}"\n')
            with (folder / "known_hosts").open("a") as pins:
                pins.write((own / "known_hosts").read_text())
        return folder


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def namespace(name: str) -> str:
    return f"metal-{os.getpid()}-{name}"


def outside(name: str) -> str:
    """The test's end of a machine's cable."""
    return f"m{os.getpid() % 1_000_000}{name[0]}"


def cut_cables() -> None:
    """A namespace may live on for a while after its name is gone, with what is in it: its cables go first."""
    for name in NAMES:
        for words in (["link", "del", outside(name)], ["netns", "del", namespace(name)]):
            subprocess.run(["ip", *words], capture_output=True, check=False)


def lay_cables(number: int) -> None:
    for index, name in enumerate(NAMES):
        within = namespace(name)
        ip("netns", "add", within)
        ip("link", "add", outside(name), "type", "veth", "peer", "name", "eth0", "netns", within)
        ip("addr", "add", f"10.81.{number}.{4 * index + 1}/30", "dev", outside(name))
        ip("link", "set", outside(name), "up")
        ip("-n", within, "addr", "add", f"10.81.{number}.{4 * index + 2}/30", "dev", "eth0")
        ip("-n", within, "addr", "add", "172.31.0.1/32", "dev", "lo")
    one, other = map(namespace, NAMES)
    ip("-n", one, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", other)
    for index, name in enumerate(NAMES):
        ip("-n", namespace(name), "addr", "add", f"10.82.{number}.{index + 1}/24", "dev", "cable")
        for interface in ("lo", "eth0", "cable"):
            ip("-n", namespace(name), "link", "set", interface, "up")


@contextmanager
def pair(folder: Path) -> Iterator[Pair]:
    """Installed machines as `installed` makes them, and a session to each. Needs root."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and ip, for the network namespaces")
    number = os.getpid() % 256
    with ExitStack() as stack:
        stack.callback(cut_cables)
        lay_cables(number)
        servers = {}
        for index, name in enumerate(NAMES):
            address = f"10.81.{number}.{4 * index + 2}"
            servers[name] = Sshd(folder / name, address=address, netns=namespace(name))
            stack.callback(servers[name].close)
        hosts = {name: stack.enter_context(installed(server, name=name)) for name, server in servers.items()}
        yield Pair(number, servers, hosts)
