"""The command line of a virtual machine. Pure: nothing is started here."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MEMORY_MIB = 2048
PROCESSORS = 2
MEDIUM = "medium-device"  # the id by which QEMU's control channel knows it
OPTICAL_PORT = 5  # the last one of q35's SATA controller: disks begin with the first
LAST = 9  # in the firmware's order, after every disk
LOOPBACK = "127.0.0.1"
NETWORK = "net"  # the id by which QEMU's control channel knows it
GUEST_SEES_HOST_AS = "10.0.2.2"  # QEMU's user network: the host's loopback


@dataclass(frozen=True)
class Disk:
    """A blank disk. The serial is what a machine file names it by; at most 20 characters on virtio and SATA."""

    serial: str
    size_gib: int = 8
    bus: Literal["virtio", "nvme", "sata"] = "virtio"

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
    tpm: bool = False
    optical: bool = (
        False  # the medium is a CD-ROM, and there is a screen; no state of such a machine is saved
    )

    @property
    def key(self) -> str:
        disks = ",".join(disk.key for disk in self.disks)
        return f"{disks} {self.accelerator.name} {self.memory_mib} {self.processors} {self.tpm}"


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
    tpm_socket: Path = Path("tpm.sock")
    seed: Path | None = None  # an image that is attached as one more drive, read-only


def arguments(
    hardware: Hardware,
    files: Files,
    *,
    ssh_port: int,
    first: Literal["disk", "medium"],
    restore: Path | None,
    ssh_address: str = LOOPBACK,
    without: Collection[str] = (),
    reversed_disks: bool = False,
) -> list[str]:
    """argv of QEMU: the medium comes first on the bus, so with virtio disks it is /dev/vda, unless it is optical.

    A tool that takes the first disk that it sees would wipe its own boot medium here.
    `first` is what the firmware tries first; an empty disk falls through to the medium.
    `Vm.start` takes the medium back behind the disk at once, so that it is first once only.
    `without` are serials of disks that are not attached; `reversed_disks` attaches the others in
    the opposite order, which swaps the kernel's names for them and leaves the firmware's order.
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
    argv += ["-netdev", f"user,id={NETWORK},hostfwd={forward(ssh_address, ssh_port)}-:22"]
    argv += ["-device", f"virtio-net-pci,netdev={NETWORK},romfile="]
    argv += ["-drive", f"if=none,id=medium,format=raw,readonly=on,file={escaped(files.medium)}"]
    kind = f"ide-cd,bus=ide.{OPTICAL_PORT}" if hardware.optical else "virtio-blk-pci"
    argv += [
        "-device",
        f"{kind},id={MEDIUM},drive=medium,serial=MEDIUM,bootindex={0 if first == 'medium' else LAST}",
    ]
    if hardware.optical:
        argv += ["-device", "VGA"]
    argv += disk_arguments(hardware.disks, files.disks, without=without, reversed_disks=reversed_disks)
    if files.seed:
        argv += ["-drive", f"if=none,id=seed,format=raw,readonly=on,file={escaped(files.seed)}"]
        argv += ["-device", "virtio-blk-pci,drive=seed,serial=SEED"]
    if hardware.tpm:
        argv += ["-chardev", f"socket,id=tpm,path={escaped(files.tpm_socket)}"]
        argv += ["-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0"]
    if restore:
        argv += ["-incoming", f"exec:cat {quoted(restore)}"]
    return argv


def disk_arguments(
    disks: Sequence[Disk],
    paths: Sequence[Path],
    *,
    without: Collection[str] = (),
    reversed_disks: bool = False,
) -> list[str]:
    """Drives and devices, in the order of the bus. The firmware tries them in the order of `disks`."""
    attached = [
        (index, disk, path)
        for index, (disk, path) in enumerate(zip(disks, paths, strict=True))
        if disk.serial not in without
    ]
    argv = []
    sata_port = 0
    for index, disk, path in reversed(attached) if reversed_disks else attached:
        # cache=unsafe: what a killed QEMU wrote is in the host's page cache; only a crash of the host loses it
        drive = f"if=none,id=disk{index},format=qcow2,cache=unsafe,discard=unmap,file={escaped(path)}"
        match disk.bus:
            case "virtio":
                device = "virtio-blk-pci"
            case "nvme":
                device = "nvme"
            case "sata":
                device = f"ide-hd,bus=ide.{sata_port}"  # q35's own controller, one disk a port
                sata_port += 1
        argv += ["-drive", drive]
        argv += [
            "-device",
            f"{device},drive=disk{index},serial={disk.serial.replace(',', ',,')},bootindex={index + 1}",
        ]
    return argv


def forward(address: str, port: int) -> str:
    """One end of a forwarded port, as QEMU's options and its monitor write it."""
    return f"tcp:{address}:{port}"


def tpm_arguments(socket: Path, state: Path) -> list[str]:
    """argv of the TPM 2.0 that a machine talks to; it ends when QEMU does. State of a new folder is a new TPM's."""
    return [
        "swtpm",
        "socket",
        "--tpm2",
        "--tpmstate",
        f"dir={state}",
        "--ctrl",
        f"type=unixio,path={socket}",
        "--terminate",
    ]


def escaped(path: Path) -> str:
    """In QEMU's option lists a comma is written twice."""
    return str(path).replace(",", ",,")


def quoted(path: Path) -> str:
    """For the shell that QEMU gives `exec:` to."""
    return "'" + str(path).replace("'", "'\\''") + "'"
