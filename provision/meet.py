"""How machines that train together reach each other: over which network, at which address and port.

The way that this computer takes to a machine need not be one that the others have. So each machine listens for a
moment and tries all addresses of all others; a word that only the right one knows tells it from a stranger with the
same private address. Of the networks that connect all of them the one with the fastest card of the first machine is
taken. torchrun meets at one port; gloo and NCCL then connect every two processes at ports that the kernel picks.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations

from provision.errors import ProvisionError
from provision.units import variables

PORTS = range(29400, 29500)  # from torchrun's own default on; the first that is free
RUN_PORTS = (f"{PORTS.start}-{PORTS.stop - 1}", "32768-60999")  # and ip_local_port_range's default (ip(7))
LISTEN_S = 60
TRY_S = 4

# Answers every connection with its word, at a port of PORTS and at one that the kernel picks. The child lets go of
# the session's pipes: the exec ends with its parent.
LISTENER = """
import os, select, signal, socket, sys
token, first, last, seconds = sys.argv[1], *map(int, sys.argv[2:])
servers = []
for ports in (range(first, last), (0,)):
    for port in ports:
        try:
            servers.append(socket.create_server(("", port)))
            break
        except OSError:
            pass
    else:
        sys.exit(f"no port of {first} to {last - 1} is free")
pid = os.fork()
if pid:
    print("listening", pid, *(server.getsockname()[1] for server in servers), flush=True)
    os._exit(0)
os.setsid()
signal.alarm(seconds)
nowhere = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(nowhere, fd)
while True:
    for server in select.select(servers, (), ())[0]:
        connection = server.accept()[0]
        try:
            connection.sendall(token.encode())
        except OSError:
            pass
        connection.close()
"""
# A link's speed is in Mbit/s; -1 where it says none.
LISTEN = r"""
ip -o -4 addr show up scope global | while read -r _ interface _ address _; do
  echo "address ${address%/*} $interface $(cat "/sys/class/net/$interface/speed" 2>/dev/null || echo -1)"
done
"$python" -c "$listener" "$token" "$first" "$last" "$seconds"
"""

TRIER = """
import json, socket, sys, threading
targets, seconds = json.loads(sys.argv[1]), float(sys.argv[2])
said = {}
def attempt(target, address):
    local, why = "-", "ok"
    for port in target["ports"]:
        try:
            with socket.create_connection((address, port), timeout=seconds) as connection:
                local = connection.getsockname()[0]
                if connection.recv(100).decode(errors="replace") != target["token"]:
                    why = "another machine answers"
        except OSError as error:
            why = f"port {port}: {error.strerror or error}"
        if why != "ok":
            break
    said[target["name"], address] = f"way {target['name']} {address} {local} {why}"
ways = [(target, address) for target in targets for address in target["addresses"]]
threads = [threading.Thread(target=attempt, args=way) for way in ways]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for target, address in ways:
    print(said[target["name"], address])
"""


@dataclass(frozen=True)
class Address:
    """Of a network card that is up."""

    ip: str
    interface: str
    speed: int = -1  # Mbit/s, -1: it does not say


@dataclass(frozen=True)
class Listening:
    """A machine that waits for the others to try it."""

    name: str
    token: str
    pid: int
    ports: tuple[int, int]  # where torchrun would meet, and one that the kernel picked
    addresses: tuple[Address, ...]

    def interface_of(self, ip: str) -> str:
        return next((address.interface for address in self.addresses if address.ip == ip), "")


@dataclass(frozen=True)
class Way:
    """What came of trying `ip` of machine `target` from machine `source`."""

    source: str
    target: str
    ip: str
    local: str  # address of the source's end
    why: str  # "ok", or what was in the way


@dataclass(frozen=True)
class Node:
    """A machine's place in a run."""

    name: str
    count: int
    rank: int
    endpoint: str  # HOST:PORT of the first
    interface: str  # of this machine, towards the others

    def render(self) -> str:
        """What the run's script reads. `=` makes NCCL take the name as it is and not as the beginning of one."""
        values = variables(nodes=self.count, rank=self.rank, meet=self.endpoint)
        return f"{values}export GLOO_SOCKET_IFNAME={self.interface} NCCL_SOCKET_IFNAME=={self.interface}\n"


def new_token() -> str:
    return secrets.token_hex(16)


def listen_script(python: str, token: str) -> str:
    return (
        variables(
            python=python,
            listener=LISTENER,
            token=token,
            first=PORTS.start,
            last=PORTS.stop,
            seconds=LISTEN_S,
        )
        + LISTEN
    )


def parse_listening(name: str, token: str, text: str) -> Listening:
    addresses: list[Address] = []
    pid, ports = 0, (0, 0)
    for line in text.splitlines():
        match line.split():
            case ["address", ip, interface, speed]:
                addresses.append(Address(ip, interface, int(speed)))
            case ["listening", process, one, other]:
                pid, ports = int(process), (int(one), int(other))
    if not addresses:
        raise ProvisionError(f"{name} has no IPv4 address by which another machine could reach it.")
    return Listening(name, token, pid, ports, tuple(addresses))


def try_script(python: str, others: Sequence[Listening]) -> str:
    targets = [
        {**asdict(other), "addresses": [address.ip for address in other.addresses]} for other in others
    ]
    values = variables(python=python, trier=TRIER, targets=json.dumps(targets), seconds=TRY_S)
    return values + '"$python" -c "$trier" "$targets" "$seconds"'


def parse_ways(source: str, text: str) -> list[Way]:
    ways = []
    for line in text.splitlines():
        match line.split(" ", 4):
            case ["way", target, ip, local, why]:
                ways.append(Way(source, target, ip, local, why))
    return ways


def choose_nodes(machines: Sequence[Listening], ways: Sequence[Way]) -> list[Node]:
    """Each machine's place; the first of `machines` is the one where they meet. Raises ProvisionError with what is shut.

    A network will do when, with the card that each machine has in it, every one reaches every other.
    """
    lead, *others = machines
    open_ways = {(way.source, way.target, way.ip): way for way in ways if way.why == "ok"}
    for address in sorted(lead.addresses, key=lambda address: -address.speed):
        cards = {lead.name: address.interface}
        for other in others:
            way = open_ways.get((other.name, lead.name, address.ip))
            cards[other.name] = other.interface_of(way.local) if way else ""
        if all(cards.values()) and all(
            any((a.name, b.name, at.ip) in open_ways for at in b.addresses if at.interface == cards[b.name])
            for a, b in permutations(machines, 2)
        ):
            endpoint = f"{address.ip}:{lead.ports[0]}"
            return [
                Node(machine.name, len(machines), rank, endpoint, cards[machine.name])
                for rank, machine in enumerate(machines)
            ]
    raise no_way(machines, ways, {(source, target) for source, target, _ in open_ways})


def no_way(
    machines: Sequence[Listening], ways: Sequence[Way], connected: set[tuple[str, str]]
) -> ProvisionError:
    found: Mapping[tuple[str, str], list[str]] = {
        (a.name, b.name): [
            f"{way.ip}: {way.why}" for way in ways if (way.source, way.target) == (a.name, b.name)
        ]
        for a, b in permutations(machines, 2)
    }
    lines = [
        f"  {source} does not reach {target} ({'; '.join(tried)})"
        for (source, target), tried in found.items()
        if (source, target) not in connected
    ]
    if not lines:
        lines = ["  every two of them reach each other, but there is no network that all of them are in"]
    meeting, picked = RUN_PORTS
    return ProvisionError(
        "The machines do not all reach each other, so they cannot train together; nothing was started.\n"
        + "\n".join(lines),
        f"TCP ports {meeting} and those that the kernel picks ({picked}) must be open between them. Where a machine's "
        "file has a firewall: [firewall] peers = [the addresses of the others], then provision.",
    )
