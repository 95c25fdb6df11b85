"""The command line of a virtual machine. Pure: nothing is started here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MEMORY_MIB = 2048
PROCESSORS = 2
MEDIUM = "medium-device"  # the id by which QEMU's control channel knows it
LAST = 9  # in the firmware's order, after every disk
GUEST_SEES_HOST_AS = "10.0.2.2"  # QEMU's user network: the host's loopback


@dataclass(frozen=True)
class Disk:
    """A blank disk. The serial is what a machine file names it by."""

    serial: str
    size_gib: int = 8
    bus: Literal["virtio", "nvme"] = "virtio"

    @property
    def key(self) -> str:
        return f"{self.bus}-{self.serial}-{self.size_gib}"


@dataclass(frozen=True)
class Accelerator:
    """How instructions of the guest are run."""

    name: str
    options: tuple[str, ...]


KVM = Accelerator("kvm", ("-accel", "kvm", "-cpu", "host"))
# Emulated vector instructions beyond SSE are slower than none: a training step took 21 s with this
# processor and 41 s with `max`. `qemu64` boots faster, and lacks what torch and numpy need.
TCG = Accelerator("tcg", ("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "Nehalem"))


@dataclass(frozen=True)
class Hardware:
    """Everything that a saved state must find again to be restored."""

    disks: tuple[Disk, ...]
    accelerator: Accelerator
    memory_mib: int = MEMORY_MIB
    processors: int = PROCESSORS

    @property
    def key(self) -> str:
        disks = ",".join(disk.key for disk in self.disks)
        return f"{disks} {self.accelerator.name} {self.memory_mib} {self.processors}"


@dataclass(frozen=True)
class Files:
    """Where a machine's parts lie on the host."""

    firmware: Path
    variables: Path
    medium: Path
    disks: tuple[Path, ...]
    serial_log: Path
    serial_socket: Path
    qmp_socket: Path


def arguments(
    hardware: Hardware, files: Files, *, ssh_port: int, first: Literal["disk", "medium"], restore: Path | None
) -> list[str]:
    """argv of QEMU: the medium comes first on the bus, so with virtio disks it is /dev/vda.

    A tool that takes the first disk that it sees would wipe its own boot medium here.
    `first` is what the firmware tries first; an empty disk falls through to the medium.
    `Vm.start` takes the medium back behind the disk at once, so that it is first once only.
    """
    argv = [
        "qemu-system-x86_64",
        "-name",
        "rehearsal",
        "-machine",
        "q35,smm=off",
        *hardware.accelerator.options,
    ]
    argv += ["-smp", str(hardware.processors), "-m", str(hardware.memory_mib)]
    argv += ["-nodefaults", "-display", "none", "-rtc", "base=utc", "-device", "virtio-rng-pci"]
    argv += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={escaped(files.firmware)}"]
    argv += ["-drive", f"if=pflash,unit=1,format=raw,file={escaped(files.variables)}"]
    log = f"logfile={escaped(files.serial_log)},logappend=on"
    argv += ["-chardev", f"socket,id=serial,path={escaped(files.serial_socket)},server=on,wait=off,{log}"]
    argv += ["-serial", "chardev:serial", "-qmp", f"unix:{escaped(files.qmp_socket)},server=on,wait=off"]
    argv += ["-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{ssh_port}-:22"]
    argv += ["-device", "virtio-net-pci,netdev=net,romfile="]
    argv += ["-drive", f"if=none,id=medium,format=raw,readonly=on,file={escaped(files.medium)}"]
    argv += [
        "-device",
        f"virtio-blk-pci,id={MEDIUM},drive=medium,serial=MEDIUM,bootindex={0 if first == 'medium' else LAST}",
    ]
    argv += disk_arguments(hardware.disks, files.disks)
    if restore:
        argv += ["-incoming", f"exec:cat {quoted(restore)}"]
    return argv


def disk_arguments(disks: Sequence[Disk], paths: Sequence[Path]) -> list[str]:
    argv = []
    for index, (disk, path) in enumerate(zip(disks, paths, strict=True)):
        # cache=unsafe: what a killed QEMU wrote is in the host's page cache; only a crash of the host loses it
        drive = f"if=none,id=disk{index},format=qcow2,cache=unsafe,discard=unmap,file={escaped(path)}"
        device = "nvme" if disk.bus == "nvme" else "virtio-blk-pci"
        argv += [
            "-drive",
            drive,
            "-device",
            f"{device},drive=disk{index},serial={disk.serial},bootindex={index + 1}",
        ]
    return argv


def escaped(path: Path) -> str:
    """In QEMU's option lists a comma is written twice."""
    return str(path).replace(",", ",,")


def quoted(path: Path) -> str:
    """For the shell that QEMU gives `exec:` to."""
    return "'" + str(path).replace("'", "'\\''") + "'"
