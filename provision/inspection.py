"""A first machine file, drafted from what the machine has.

Everything that the file's author will want to know stands in it as a comment; as a setting, only what can be read
off the hardware without a choice.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from provision.apply import gather_facts
from provision.dial import own_keys
from provision.edid import Screen
from provision.errors import ProvisionError
from provision.facts import Disk, Facts
from provision.host import Host
from provision.layers import render_value
from provision.machine import Machine, at_address, is_key, load_stranger, save_local
from provision.schema import DIRECTIVE, SCHEMA
from provision.system.gpu import choose_driver, family
from provision.system.inventory import describe_disk, gibibytes

SSH_PORT = 22
LEAST_BYTES = 16 * 2**30  # base system, driver and a Python environment with CUDA's libraries


def stranger(folder: Path, host: str, port: int, name: str, address: str) -> Machine:
    """A machine to dial that may have no file yet.

    `host` is what -H says: the machine's name, or with `name` its address, which answers at `port`.
    """
    machine = load_stranger(name or host, folder)
    if name and address and address != host:
        raise ProvisionError(
            f"-H says that {name} answers at {host}, and --address that it answers at {address}.",
            f"fab -H {name} inspect --address {address}",
        )
    if address or name:
        machine = at_address(machine, address or host)
    own_port = port if name and port != SSH_PORT else machine.ssh.port
    return replace(machine, ssh=replace(machine.ssh, port=own_port))


def draft(host: Host, machine: Machine, folder: Path) -> str:
    """Look at the host, and write `NAME.toml` unless there is one. Returns what to tell the person; changes nothing there."""
    facts = gather_facts(host)
    default_works = any(map(is_key, machine.user.authorized_keys))
    keys = None if default_works else sorted(own_keys(host.login.connection, host.wanted.identities))
    text = render_draft(machine.name, facts, host.address, date.today(), port=machine.ssh.port, keys=keys)
    path = folder / f"{machine.name}.toml"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return f"{text}\n{path} exists and was left as it is; above is what this would have written."
    if machine.ssh.address:
        save_local(folder, machine.name, "ssh", "address", machine.ssh.address)
    if not (schema := folder / SCHEMA.name).exists():
        schema.write_bytes(SCHEMA.read_bytes())
    chosen = choose_disk(facts.disks)
    then = f"Next: fab -H {machine.name} plan" if chosen else f"Next: choose disk.serial in {path}"
    return f"{text}\nWritten to {path}. {then}"


def render_draft(
    name: str,
    facts: Facts,
    address: str,
    day: date,
    *,
    port: int = SSH_PORT,
    keys: Sequence[str] | None = None,
) -> str:
    """The draft as text. `keys`: public key lines that shall log in; None where the default is right."""
    found = choose_disk(facts.disks)
    lines = [
        DIRECTIVE,
        *comment(f"{name}, drafted on {day:%Y-%m-%d} from the machine at {address}. {MEANING}"),
        "",
    ]
    for text in describe_machine(facts):
        lines += comment(text)
    if port != SSH_PORT:
        lines += ["", "[ssh]", f"port = {port}"]
    lines += ["", "[disk]"]
    for disk in facts.disks:
        lines += comment(describe_disk(disk) + why_not(disk, facts.disks))
    if found:
        lines += [f"serial = {render_value(found.serial)}", f"size_gib = {round(found.size_bytes / 2**30)}"]
    else:
        lines += [f"# Choose one: {count_candidates(facts.disks)}.", '# serial = ""']
    if keys:
        lines += ["", "[user]", f"authorized_keys = {render_value(keys)}"]
    elif keys is not None:
        lines += ["", *comment(NO_KEY)]
    lines += ["", "[gpu]"]
    for text in describe_gpus(facts):
        lines += comment(text)
    return "\n".join(lines) + "\n"


MEANING = "What is not said here is as in defaults.toml."
NO_KEY = "This computer has no SSH key, so nobody could log in after the installation. Make one: ssh-keygen -t ed25519"


def comment(text: str) -> list[str]:
    """Comment lines. Hardware may call itself anything: what TOML allows in no comment becomes '?'."""
    return [
        f"# {''.join(character if character.isprintable() else '?' for character in line)}".rstrip()
        for line in text.split("\n")
    ]


def describe_machine(facts: Facts) -> Iterator[str]:
    yield (
        "firmware: UEFI"
        if facts.uefi
        else "firmware: BIOS; refused as it is: switch it to UEFI, and legacy boot (CSM) off"
    )
    yield f"processor: {facts.cpu_model or 'unnamed'}" + (
        f" ({facts.cpu_vendor})" if facts.cpu_vendor else ""
    )
    yield f"memory: {gibibytes(facts.memory_bytes)}"
    for name, mac in facts.nics:
        yield f"network: {name}, {mac}"
    for screen in facts.screens:
        yield f"screen: {describe_screen(screen)}"


def describe_screen(screen: Screen) -> str:
    parts = [f"{screen.connector}, {screen.name or 'unnamed'}"]
    if screen.width_px:
        parts.append(f"{screen.width_px} x {screen.height_px} at {screen.refresh_hz:.0f} Hz")
    if screen.width_mm:
        parts.append(f"{screen.width_mm} x {screen.height_mm} mm")
    if screen.dots_per_inch:
        parts.append(f"{screen.dots_per_inch} dots per inch")
    return ", ".join(parts) if screen.width_px or screen.width_mm else f"{parts[0]}, says nothing of its size"


def describe_gpus(facts: Facts) -> Iterator[str]:
    """The cards, and the driver that `driver = "auto"` means for them, with the reason."""
    for gpu in facts.gpus:
        yield f"{gpu.slot}: 10de:{gpu.device:04x}, {family(gpu.device)}"
    try:
        driver = choose_driver("auto", facts.gpus, ("linux-lts",))
    except ProvisionError as error:
        yield error.message
        yield error.hint
        return
    if driver:
        yield f"auto means {' '.join(driver.packages)}: {driver.reason}"
    else:
        yield "no NVIDIA card: auto means no driver"


def choose_disk(disks: Sequence[Disk]) -> Disk | None:
    """The one disk that can be meant, None where there is none or a choice."""
    possible = [disk for disk in disks if not why_not(disk, disks)]
    return possible[0] if len(possible) == 1 else None


def why_not(disk: Disk, disks: Sequence[Disk]) -> str:
    """Why a disk cannot be installed on, as the end of its description; "" where it can."""
    if disk.is_medium:
        return "\n  not this: the install ISO runs from it"
    if disk.read_only:
        return "\n  not this: read-only"
    if not disk.serial:
        return "\n  not this: it has no serial number to know it by"
    if not disk.serial.isprintable():
        return "\n  not this: its serial number holds what cannot be printed"
    if Counter(other.serial for other in disks)[disk.serial] > 1:
        return "\n  not this: another disk has the same serial number"
    if disk.size_bytes < LEAST_BYTES:
        return f"\n  not this: smaller than {gibibytes(LEAST_BYTES)}"
    return ""


def count_candidates(disks: Sequence[Disk]) -> str:
    possible = sum(not why_not(disk, disks) for disk in disks)
    return (
        f"{possible} of these disks can be installed on" if possible else "none of these can be installed on"
    )
