"""Where a machine may answer, and whose host key answers there: names, the neighbour table, the subnet.

A host key is read without logging in: the server proves in the handshake that it holds the private half.
"""

import ipaddress
import logging
import re
import shutil
import socket
import subprocess
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import paramiko

from provision.dial import prefer_kinds
from provision.machine import Machine
from provision.pins import live_alias, load_pins, unlock_alias

ISO_NAME = (
    "archiso.local"  # what the ISO answers to in mDNS, unless a seed named it (archiso's releng profile)
)
SWEEP_AT_ONCE = 128
SWEEP_LIMIT = 1024  # addresses
CONNECT_S = 1.5  # on a local network an answer takes milliseconds; a packet may get lost
HANDSHAKE_S = 5.0  # a machine that is booting is slow

MAC = re.compile(r"(?:[0-9a-f]{1,2}:){5}[0-9a-f]{1,2}", re.I)
ADDRESS = re.compile(r"(?<![\w.:])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])")
INTERFACE = re.compile(
    r"\binet ([0-9.]+)(?:/(\d+)| netmask (0x[0-9a-f]{8}))"
)  # of `ip` and of macOS' ifconfig

Network = ipaddress.IPv4Network


# Names and neighbours


def neighbours(table: str, macs: Collection[str]) -> list[str]:
    """IPv4 addresses beside these MACs in the output of `ip neighbour` or `arp -an`, in its order."""
    wanted = {normal_mac(mac) for mac in macs}
    found = []
    for line in table.splitlines():
        mac, address = MAC.search(line), ADDRESS.search(line)
        if mac and address and normal_mac(mac[0]) in wanted:
            found.append(address[0])
    return found


def normal_mac(mac: str) -> str:
    """Lower case, two digits a byte: macOS prints 0:1b:… for 00:1b:…"""
    return ":".join(f"{int(byte, 16):02x}" for byte in mac.split(":"))


def first_program(*commands: Sequence[str]) -> str:
    """The output of the first of these programs that this computer has; "" where it has none."""
    for argv in commands:
        if shutil.which(argv[0]):
            return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=10).stdout
    return ""


def load_neighbours() -> str:
    return first_program(["ip", "neighbour"], ["arp", "-an"])


def names(machine: Machine) -> list[str]:
    """What the machine is called, by mDNS and by DNS."""
    return [f"{machine.system.hostname}.local", machine.system.hostname]


def elsewhere(machine: Machine, macs: Collection[str]) -> list[str]:
    """Where the machine may answer after a reboot, beside its address: under its names, and beside its MACs."""
    return [*names(machine), *neighbours(load_neighbours(), macs)]


# Host keys


def host_key_at(
    address: str,
    port: int,
    kinds: Iterable[str],
    *,
    connect_s: float = CONNECT_S,
    handshake_s: float = HANDSHAKE_S,
) -> str:
    """The host key that answers there, as `TYPE BASE64`; "" where none does. `kinds` are asked for first."""
    logging.getLogger("paramiko").addHandler(
        logging.NullHandler()
    )  # its threads' tracebacks, of no SSH server
    with (
        suppress(OSError, EOFError, paramiko.SSHException),
        socket.create_connection((address, port), timeout=connect_s) as sock,
    ):
        transport = paramiko.Transport(sock)
        try:
            prefer_kinds(transport, kinds)
            transport.banner_timeout = handshake_s
            transport.start_client(timeout=handshake_s)
            key = transport.get_remote_server_key()
            return f"{key.get_name()} {key.get_base64()}"
        finally:
            transport.close()
    return ""


def pinned_keys(machine: Machine, pins: Path, *, live: bool = True) -> set[str]:
    """The keys by which we know the machine, whichever of its systems answers."""
    known = load_pins(pins)
    aliases = [machine.name, unlock_alias(machine.name), *([live_alias(machine.name)] if live else [])]
    return {known[alias] for alias in aliases if alias in known}


def find_by_name(machine: Machine, pins: Path) -> str:
    """A name under which a key answers that is pinned for this machine; "" where there is none."""
    wanted = pinned_keys(machine, pins)
    tried = machine.ssh.address or machine.name
    for place in [*names(machine), ISO_NAME] if wanted else []:
        if place != tried and host_key_at(place, machine.ssh.port, kinds_of(wanted)) in wanted:
            return place
    return ""


def kinds_of(keys: Iterable[str]) -> list[str]:
    return sorted({key.split()[0] for key in keys})


# The subnet


def subnet(address: str, interfaces: str) -> Network | None:
    """The subnet to sweep around an IPv4 address: that of this computer's interface there, else its /24.

    `interfaces` is the output of `ip -4 addr` or `ifconfig`. Never more than SWEEP_LIMIT addresses.
    """
    try:
        centre = ipaddress.IPv4Address(address)
    except ValueError:
        return None
    prefixes = [network.prefixlen for network in own_networks(interfaces) if centre in network]
    least = 32 - (SWEEP_LIMIT.bit_length() - 1)
    return ipaddress.IPv4Network((centre, max(max(prefixes, default=24), least)), strict=False)


def own_networks(interfaces: str) -> Iterator[Network]:
    for address, prefix, mask in INTERFACE.findall(interfaces):
        length = int(prefix) if prefix else bin(int(mask, 16)).count("1")
        yield ipaddress.IPv4Network((address, length), strict=False)


def load_interfaces() -> str:
    return first_program(["ip", "-4", "addr"], ["ifconfig"])


def sweep(network: Network, port: int, wanted: Collection[str]) -> list[str]:
    """The addresses of the subnet where one of these host keys answers. Logs in nowhere."""
    kinds = kinds_of(wanted)
    addresses = [str(address) for address in network.hosts()]
    with ThreadPoolExecutor(SWEEP_AT_ONCE, thread_name_prefix="sweep") as pool:
        keys = pool.map(lambda address: host_key_at(address, port, kinds), addresses)
        return [address for address, key in zip(addresses, keys, strict=True) if key in wanted]
