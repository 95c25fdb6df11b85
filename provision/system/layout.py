"""How a machine's disks are divided: partitions, encrypted volumes, file systems, and where they are mounted. Pure.

The ids of partitions (PARTUUID), volumes and file systems are computed from the machine's name, the disk's serial
and the kind of layout. So they are known before they exist: /etc/fstab and the boot entry name them, and a disk that
carries them is ours, for this machine, laid out as its file says.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from provision.machine import Machine

# Discoverable Partitions Specification: https://uapi-group.org/specifications/specs/discoverable_partitions_specification/
ESP_TYPE = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
ROOT_TYPE = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"  # root, x86-64
HOME_TYPE = "933ac7e1-2eb4-4f13-b844-0e14e2aef915"
SWAP_TYPE = "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f"
DATA_TYPE = "0fc63daf-8483-4772-8e79-3d69d8477de4"  # Linux file system
MOUNT = "/mnt"
ESP_OPTIONS = "fmask=0077,dmask=0077"  # FAT keeps no modes: nobody but root may read the ESP
DATA_OPTIONS = (
    "nofail,x-systemd.device-timeout=10"  # a data disk that died must not keep the machine from booting
)
DEGRADED = "metal_degraded"  # on the kernel's command line: see the udev rule in mirror.py
SWAP_FILE = "/swap/swapfile"
KEY_FILE = (
    "/etc/cryptsetup-keys.d/home.key"  # where systemd-cryptsetup looks for the key of the volume `home`
)

# A subvolume for whatever should not go back when the root does (snapshots are of @).
SUBVOLUMES = (
    ("@", "/"),
    ("@home", "/home"),
    ("@log", "/var/log"),
    ("@pkg", "/var/cache/pacman/pkg"),
    ("@snapshots", "/.snapshots"),
)

LOOK = r"""
look() {  # DEVICE: kind and id of the file system on it; "blank" where nothing is; never that in doubt
  local said status=0 kind id
  said=$(blkid --probe --output export "$1" 2> /dev/null) || status=$?
  kind=$(sed -n 's/^TYPE=//p; s/^PTTYPE=/partitions:/p' <<< "$said" | head -n 1)
  id=$(sed -n 's/^UUID=//p' <<< "$said")
  # 0 with no kind: blkid knows the partition's own entry; 2: nothing at all; 8: two kinds that exclude each other
  if ((status != 0 && status != 2)); then echo "unclear (blkid says $status)"
  else echo "${kind:-blank}${id:+ $id}"; fi
}
"""

Kind = Literal["esp", "swap", "root", "home"]


@dataclass(frozen=True)
class Part:
    """One partition. `volume` is the id of the LUKS volume in it, opened as /dev/mapper/`mapper`; "" where it is none."""

    kind: Kind
    serial: str  # of its disk, as the machine file has it
    type_guid: str
    uuid: str
    name: str  # PARTLABEL
    size_mib: int  # 0: what is left; for swap: by memory
    volume: str = ""
    mapper: str = ""

    @property
    def path(self) -> str:
        return f"/dev/disk/by-partuuid/{self.uuid}"

    @property
    def device(self) -> str:
        """What the file system lies on."""
        return f"/dev/mapper/{self.mapper}" if self.mapper else self.path


@dataclass(frozen=True)
class Mount:
    """A line of /etc/fstab. `source` is PARTUUID=… or UUID=… (of the file system)."""

    source: str
    folder: str
    filesystem: str
    options: str
    check: int  # fsck's pass

    @property
    def device(self) -> str:
        tag, _, value = self.source.partition("=")
        return f"/dev/disk/by-{tag.lower()}/{value}"

    @property
    def looking(self) -> str:
        """Options for a look that writes nothing, not even what a journal still holds."""
        kept = [
            option for option in self.options.split(",") if option.startswith(("subvol=", "fmask=", "dmask="))
        ]
        careful = {"ext4": ["noload"], "btrfs": ["rescue=nologreplay"]}.get(self.filesystem, [])
        return ",".join(["ro", *careful, *kept])


@dataclass(frozen=True)
class Layout:
    parts: tuple[Part, ...]
    mounts: tuple[Mount, ...]  # in the order in which they are mounted
    root_filesystem: str  # id of the root's file system, where we give it one
    home_filesystem: str
    subvolumes: tuple[str, ...]  # of the root's file system

    def of(self, kind: Kind) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.kind == kind)

    def on(self, serial: str) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.serial == serial)

    @property
    def esp(self) -> Part:
        return self.of("esp")[0]

    @property
    def roots(self) -> frozenset[str]:
        """PARTUUIDs of what may lie under /."""
        return frozenset(part.uuid for part in self.of("root"))

    @property
    def encrypted(self) -> tuple[Part, ...]:
        """What is asked for a passphrase; swap gets a new key at each boot."""
        return tuple(part for part in self.parts if part.volume)

    @property
    def probe_mounts(self) -> tuple[tuple[str, str, str], ...]:
        """How a probe looks into a half-installed disk."""
        return tuple((mount.device, target(mount), mount.looking) for mount in self.mounts)


def target(mount: Mount) -> str:
    """Its folder while installing."""
    return (MOUNT + mount.folder).rstrip("/")


def layout(machine: Machine) -> Layout:
    """The partitions and mounts that the machine file asks for."""
    disk = machine.disk
    btrfs = disk.filesystem == "btrfs"
    root_filesystem, home_filesystem = (
        identify(machine, disk.serial, f"{kind}-filesystem") for kind in ("root", "home")
    )
    parts = tuple(divide(machine))
    root = next(part for part in parts if part.kind == "root")
    source = f"UUID={root_filesystem}" if btrfs or root.volume else f"PARTUUID={root.uuid}"
    names = [*SUBVOLUMES, *([("@swap", "/swap")] if disk.swap == "file" else [])] if btrfs else []
    mounts = [
        Mount(source, folder, "btrfs", f"rw,noatime,compress=zstd:1,subvol=/{name}", 0)
        for name, folder in names
    ] or [Mount(source, "/", "ext4", "rw,relatime", 1)]
    for home in (part for part in parts if part.kind == "home"):
        place = f"UUID={home_filesystem}" if home.volume else f"PARTUUID={home.uuid}"
        mounts.append(Mount(place, "/home", "ext4", "rw,relatime", 2))
    esp = next(part for part in parts if part.kind == "esp")
    # Of a mirrored machine the disk with the first ESP may be the one that is gone.
    wanted = f"rw,relatime,{ESP_OPTIONS}{',nofail' if disk.mirror else ''}"
    mounts.append(Mount(f"PARTUUID={esp.uuid}", "/boot", "vfat", wanted, 2))
    return Layout(parts, tuple(mounts), root_filesystem, home_filesystem, tuple(name for name, _ in names))


def divide(machine: Machine) -> Iterator[Part]:
    """The partitions, disk by disk, in their order on it."""
    disk = machine.disk
    encrypted = disk.encryption == "luks"
    # Another kind of layout has other ids: what an older machine file laid out is not taken for this one.
    words = [
        disk.filesystem if disk.filesystem != "ext4" else "",
        "luks" if encrypted else "",
        "mirror" if disk.mirror else "",
    ]
    flavour = "".join(f"-{word}" for word in words if word)

    def part(kind: Kind, serial: str, type_guid: str, size_mib: int = 0, mapper: str = "") -> Part:
        distinct = kind if kind == "esp" else kind + flavour
        name = f"{'ESP' if kind == 'esp' else kind}@{machine.name}"[:36]
        volume = identify(machine, serial, f"{distinct}-volume") if mapper else ""
        return Part(
            kind, serial, type_guid, identify(machine, serial, distinct), name, size_mib, volume, mapper
        )

    for number, serial in enumerate(disk.system_serials, 1):
        yield part("esp", serial, ESP_TYPE, disk.esp_mib)
        if disk.swap == "partition" and number == 1:
            yield part("swap", serial, SWAP_TYPE, disk.swap_gib * 1024)
        mapper = ("root" if number == 1 else f"root{number}") if encrypted else ""
        yield part("root", serial, ROOT_TYPE, disk.root_gib * 1024, mapper)
        if disk.root_gib:
            yield part("home", serial, HOME_TYPE, mapper="home" if encrypted else "")


def identify(machine: Machine, serial: str, kind: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"metal-to-model:{machine.name}:{serial}:{kind}"))


def by_dhcp(nics: int) -> str:
    """For the hook netconf: addresses for every card, which have the kernel's own names there; an unplugged one costs 30 s."""
    cards = [f":::::eth{number}:dhcp" for number in range(max(nics, 1))]
    return f"ip={cards[0]}" if len(cards) == 1 else f"ip=ip={':ip='.join(cards)} netconf_timeout=30"


def kernel_options(machine: Machine, nics: int, *, degraded: bool = False) -> str:
    """What the kernel and the initramfs must be told to find the root.

    `nics`: how many network cards there are. `degraded`: a disk of the mirror is gone.
    """
    ids = layout(machine)
    root = ids.mounts[0]
    words = []
    if machine.disk.unlock == "ssh":  # hooks netconf and encryptssh, which know one device
        words += [f"cryptdevice=UUID={ids.of('root')[0].volume}:root:allow-discards", by_dhcp(nics)]
    elif machine.disk.encryption == "luks":
        options = ["discard", *(["tpm2-device=auto"] if machine.disk.unlock == "tpm2" else [])]
        for part in ids.of("root"):
            words += [
                f"rd.luks.name={part.volume}={part.mapper}",
                f"rd.luks.options={part.volume}={','.join(options)}",
            ]
    encrypted = machine.disk.encryption == "luks"
    # systemd waits for a passphrase without end where it is told of the volume, for other names 90 s.
    words += [f"root={'/dev/mapper/root' if encrypted and not machine.disk.mirror else root.source}"]
    if root.filesystem == "btrfs":
        flags = ["degraded"] if degraded else []
        flags += ["x-systemd.device-timeout=0"] if encrypted and machine.disk.mirror else []
        words += [f"rootflags={','.join([*flags, root.options.rpartition(',')[2]])}"]
    if degraded:
        words += [f"{DEGRADED}=1"]
    if machine.disk.swap == "zram":
        words += ["zswap.enabled=0"]  # it would keep in memory what zram keeps there already
    return " ".join([*words, "rw"])


def show_filesystem(devices: str) -> str:
    """Bash: wait until /dev/disk/by-uuid has what was just made on them.

    udev hears of it through inotify, and may not have heard yet when `settle` asks whether it has anything to do.
    """
    return f"udevadm trigger --settle {devices}\nudevadm settle --timeout=30"
