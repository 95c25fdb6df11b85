"""The virtual machine that a machine file describes, and what has to be otherwise in it. Pure: nothing is started here."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from provision.layers import render_key, render_value
from provision.machine import Machine
from provision.rehearsal.qemu import Disk

ANY_SIZE_GIB = 64  # of a disk whose size the file leaves open; its image only grows with what is written
SERIAL = re.compile(r"[A-Za-z0-9_-]{1,20}")  # as long as virtio's, SATA's and NVMe's may be
BY_ID = re.compile(r"(ata|nvme|scsi|usb|virtio|wwn|mmc|dm|md)-.+")
CONSOLE = "console=ttyS0 systemd.show_status=0 mitigations=off audit=0"  # emulated, every instruction counts
ANY_WIRED = "en* eth*"  # network.match of machines/defaults.toml: the virtual machine's interface has a name of its own
SHELLS = ("/bin/bash", "/usr/bin/bash", "/bin/zsh", "/usr/bin/zsh", "/bin/sh")
# Groups of every Arch, and those that packages of the bed bring.
GROUPS = {
    *(
        "adm",
        "audio",
        "dialout",
        "disk",
        "floppy",
        "games",
        "input",
        "kmem",
        "kvm",
        "log",
        "lp",
        "optical",
        "power",
    ),
    *("proc", "render", "rfkill", "scanner", "storage", "sys", "tty", "users", "uucp", "video", "wheel"),
}


@dataclass(frozen=True)
class StandIns:
    """What the machine file names and the rehearsal's repository lacks: made as packages with nothing in them."""

    packages: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()  # groups of packages
    units: tuple[str, ...] = ()  # services and timers: they do nothing, where the system does not have them
    accounts: tuple[str, ...] = ()  # groups of people

    def __bool__(self) -> bool:
        return bool(self.packages or self.groups)  # units and accounts come with one of them, or not at all


@dataclass(frozen=True)
class Likeness:
    """`wishes`: TOML over the machine file. `differences`: for a person, what a rehearsal of it does not show."""

    disks: tuple[Disk, ...]
    tpm: bool
    wishes: str
    differences: tuple[str, ...]
    stand_ins: StandIns


def liken(machine: Machine, example: Machine, known: Collection[str]) -> Likeness:
    """The virtual machine for a machine file.

    `example` is machines/rehearsal.toml, whose Python environment is the one that the bed has wheels for. `known`:
    names of packages in the bed's repository.
    """
    serials = choose_serials(machine)
    sections = anywhere(machine, serials)
    sections["python"] = {
        key: getattr(example.python, key) for key in ("interpreter", "torch", "torch_index", "offline")
    }
    differences = [
        f"no GPU; its kernel parameters end in {CONSOLE}",
        f"packages come from a repository cut from Debian; Python is {example.python.interpreter} with {example.python.torch}",
        "only the rehearsal's own key logs in",
    ]
    differences += differences_anywhere(machine, serials)
    if machine.gpu.driver == "auto":
        sections["gpu"] = {"driver": "open"}
        differences.append(
            'gpu.driver is "open" in place of "auto": the packages are installed, stand-ins without a driver'
        )
    if machine.user.shell not in SHELLS:
        sections["user"] = {"shell": SHELLS[0]}
        differences.append(f"user.shell is {SHELLS[0]} in place of {machine.user.shell}")
    stand_ins = missing(machine, known)
    if names := (*stand_ins.packages, *stand_ins.groups):
        differences.append(f"stand-ins with nothing in them: {', '.join(names)}")
    return Likeness(
        choose_disks(machine, serials),
        machine.disk.unlock == "tpm2",
        render_sections(sections),
        tuple(differences),
        stand_ins,
    )


def liken_to_real(machine: Machine) -> Likeness:
    """The virtual machine for a machine file, where ISO, mirrors and packages are Arch's own: nothing stands in."""
    serials = choose_serials(machine)
    driver = (
        "nothing of NVIDIA is installed"
        if machine.gpu.driver != "open"
        else "the driver is installed, and runs on nothing"
    )
    differences = [
        f"no GPU: {driver}; its kernel parameters end in {CONSOLE}",
        *differences_anywhere(machine, serials),
    ]
    return Likeness(
        choose_disks(machine, serials),
        machine.disk.unlock == "tpm2",
        render_sections(anywhere(machine, serials)),
        tuple(differences),
        StandIns(),
    )


def anywhere(machine: Machine, serials: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """The wishes that hardware of software has, wherever its packages come from."""
    data = [f"{serials[serial]} {folder}" for serial, folder in machine.disk.data_disks]
    sections: dict[str, dict[str, object]] = {
        "disk": {
            "serial": serials[machine.disk.serial],
            "mirror": serials.get(machine.disk.mirror, ""),
            "data": data,
        },
        "system": {"cmdline": f"{machine.system.cmdline} {CONSOLE}".strip()},
    }
    if machine.network.match != ANY_WIRED:
        sections["network"] = {"match": ANY_WIRED}
    return sections


def differences_anywhere(machine: Machine, serials: Mapping[str, str]) -> list[str]:
    renamed = [f"disk {was} is called {now}" for was, now in serials.items() if was != now]
    if machine.network.match == ANY_WIRED:
        return renamed
    return [*renamed, f"network.match is {ANY_WIRED} in place of {machine.network.match}"]


def choose_serials(machine: Machine) -> dict[str, str]:
    """What each disk of the machine file is called in the virtual machine: the same, where a virtual disk can be."""
    wanted = (*machine.disk.system_serials, *(serial for serial, _ in machine.disk.data_disks))
    return {
        serial: serial if SERIAL.fullmatch(serial) and not BY_ID.fullmatch(serial) else f"REHEARSAL{index}"
        for index, serial in enumerate(wanted)
    }


def choose_disks(machine: Machine, serials: dict[str, str]) -> tuple[Disk, ...]:
    system = machine.disk.size_gib or ANY_SIZE_GIB
    sizes = dict.fromkeys(machine.disk.system_serials, system)
    return tuple(Disk(serials[serial], sizes.get(serial, ANY_SIZE_GIB)) for serial in serials)


def missing(machine: Machine, known: Collection[str]) -> StandIns:
    """What the bed has not, of all that the machine file names."""
    wanted = {*machine.system.packages, *(name for names in machine.packages.values() for name in names)}
    people = {group for user in machine.users.values() for group in user.groups}
    wished = {name for name, state in machine.units.items() if state != "masked"}
    return StandIns(
        tuple(sorted(wanted - {*known})),
        tuple(sorted(machine.system.groups)),
        tuple(sorted(name for name in wished if name.endswith((".service", ".timer")))),
        tuple(sorted(people - GROUPS - {machine.user.name, *machine.users})),
    )


def render_sections(sections: Mapping[str, Mapping[str, object]]) -> str:
    return "\n".join(render_section(name, values) for name, values in sections.items())


def render_section(name: str, values: Mapping[str, object]) -> str:
    return (
        "\n".join(
            [f"[{name}]", *(f"{render_key(key)} = {render_value(value)}" for key, value in values.items())]
        )
        + "\n"
    )
