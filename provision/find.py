"""Finding a machine again after its reboot: by the host key that we made there, wherever it answers.

A DHCP server often gives the installed system another address than the ISO had. So where the old address stays
silent, the machine is looked for under its name (DNS, mDNS), and where this computer's neighbour table has its MAC.
"""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from provision.dial import Wanted
from provision.errors import ProvisionError, UnknownKey
from provision.host import Host, Progress, say_nothing
from provision.machine import Machine

ELSEWHERE_AFTER_S = 30.0  # of silence at the old address, before others are tried
ELSEWHERE_TIMEOUT_S = 3.0
MAC = re.compile(r"(?:[0-9a-f]{1,2}:){5}[0-9a-f]{1,2}", re.I)
ADDRESS = re.compile(r"(?<![\w.:])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])")


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


def load_neighbours() -> str:
    """This computer's neighbour table as text; "" where there is no program to ask."""
    for argv in (["ip", "neighbour"], ["arp", "-an"]):
        if shutil.which(argv[0]):
            return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=10).stdout
    return ""


def elsewhere(machine: Machine, macs: Collection[str]) -> list[str]:
    """Where else the machine may answer: under its host name, and where its network card is seen."""
    hostname = machine.system.hostname
    places = [f"{hostname}.local", hostname, *neighbours(load_neighbours(), macs)]
    return [place for place in dict.fromkeys(places) if place != (machine.ssh.address or machine.name)]


@dataclass(frozen=True)
class Look:
    """What one attempt saw: the machine itself, or why not. `final`: waiting longer will not help."""

    host: Host | None = None
    seen: str = ""
    final: ProvisionError | None = None


def look(wanted: Wanted, old_boot_id: str, on_wait: Progress) -> Look:
    """One attempt at one address. The system before the reboot may still answer: its boot id tells."""
    name = wanted.machine.name
    try:
        host = Host(wanted, progress=on_wait)
    except UnknownKey as error:
        message = f"After the reboot, {error.message}\nExpected the key of the installed system."
        return Look(seen=error.message, final=ProvisionError(message, boot_order(name)))
    except ProvisionError as error:
        return Look(seen=error.message)
    new = ask_boot_id(host)
    restarted = new not in ("", old_boot_id)
    if restarted and host.system == "installed":
        return Look(host)
    host.close()
    if restarted:
        return Look(final=ProvisionError(f"{name} restarted and is on the ISO again.", boot_order(name)))
    return Look(seen=f"{name} has not gone down yet" if new else f"{name} is going down")


def reconnect_after_reboot(
    machine: Machine,
    pins: Path,
    old_boot_id: str,
    *,
    deadline_s: float,
    password: str = "",
    key_files: Sequence[str] = (),
    others: Callable[[], Iterable[str]] = tuple,
    on_wait: Progress = say_nothing,
    timeout_s: float = 5,
    poll_s: float = 2,
    elsewhere_after_s: float = ELSEWHERE_AFTER_S,
) -> Host:
    """Wait for the installed system, known by the key pinned as NAME and by a new boot id.

    `others` gives more addresses to look at where the known one is silent. Raises ProvisionError when the ISO
    comes up again, at once; at the deadline, with what was seen last.
    """
    wanted = Wanted(machine, pins, "", password, tuple(key_files), None, timeout_s)
    started, last = time.monotonic(), ""
    while True:
        here = look(wanted, old_boot_id, on_wait)
        if here.host:
            return here.host
        waited = time.monotonic() - started
        if here.final or waited > elsewhere_after_s:
            for address in others():
                ssh = replace(machine.ssh, address=address)
                there = replace(wanted, machine=replace(machine, ssh=ssh), timeout_s=ELSEWHERE_TIMEOUT_S)
                if host := look(there, old_boot_id, on_wait).host:
                    return host
        if here.final:
            raise here.final
        if here.seen != last:
            on_wait(f"{waited:.0f} s: {here.seen}")
            last = here.seen
        if waited > deadline_s:
            raise ProvisionError(
                f"Waited {waited:.0f} s for {machine.name} to come back from its reboot; last seen: {here.seen}",
                f"Its console shows its address; if that is a new one: fab -H {machine.name} provision --address NEW\n"
                f"If it is the same, when it is up: fab -H {machine.name} provision",
            )
        time.sleep(poll_s)


def ask_boot_id(host: Host) -> str:
    """ "" where the host goes down while it is asked."""
    try:
        return host.boot_id()
    except ProvisionError:
        return ""


def boot_order(name: str) -> str:
    return (
        "Take the install medium out, or put the disk first in the firmware's boot order, and restart. Then:\n"
        f"  fab -H {name} provision"
    )
