"""What one read-only probe saw on a host.

`PROBE` is a bash script that prints `@name` headers, each followed by that section's lines;
`parse_facts` turns its output into `Facts`. The probe needs nothing that the Arch install ISO lacks.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from provision.edid import Screen, parse_screen
from provision.errors import ProvisionError

# Shared by the probe and by the script that wipes: what a disk holds, as text that changes when the disk does.
HOLDINGS = r"""
holdings() {  # the device's partitions, file systems, labels and identities; without mount points
  # Not what is stacked on it: that comes and goes, and lies on other disks as well.
  lsblk --bytes --raw --noheadings --output TYPE,SIZE,FSTYPE,LABEL,UUID,PARTTYPE,PARTUUID,PARTLABEL "$1" | grep -E '^(disk|part) '
}
is_blank() {  # DISK: no signature that wipefs knows, and zeros where tables and superblocks would be
  local bytes signatures start_mib
  bytes=$(blockdev --getsize64 "$1") && ((bytes >= 1048576)) || return  # a card reader without a card, a disk just pulled out
  signatures=$(wipefs --no-act --noheadings "$1") && [[ -z $signatures ]] || return
  for start_mib in 0 $((bytes / 1048576 - 1)); do
    dd if="$1" bs=1M skip="$start_mib" count=1 status=none | cmp --silent --bytes=1048576 - /dev/zero || return
  done
}
"""

# In a subshell: whatever follows it in one exec has none of its variables.
PROBE = (
    "(\n"
    + HOLDINGS
    + r"""
used_bytes() {  # DEVICE KIND: bytes in use, read from the file system's own records, without mounting it
  case $2 in
    ext*) dumpe2fs -h "$1" | awk -F': *' '/^Block count/ {n=$2} /^Free blocks/ {f=$2} /^Block size/ {s=$2} END {printf "%.0f", (n-f)*s}' ;;
    btrfs) btrfs inspect-internal dump-super "$1" | awk '$1 == "bytes_used" {print $2}' ;;
    xfs) xfs_db -r -c 'sb 0' -c 'print dblocks fdblocks blocksize' "$1" |
      awk '{v[$1]=$3} END {printf "%.0f", (v["dblocks"]-v["fdblocks"])*v["blocksize"]}' ;;
    ntfs) ntfsinfo --mft "$1" | awk -F': *' '/Cluster Size/ {s=$2} /Volume Size in Clusters/ {n=$2} /Free Clusters/ {f=$2+0} END {printf "%.0f", (n-f)*s}' ;;
  esac
}
section() { printf '\n@%s\n' "$1"; }
section system
if [[ -d /run/archiso ]] && grep -q archisobasedir /proc/cmdline; then echo live
elif [[ -e /etc/metal-to-model ]]; then echo installed
else echo other; fi
section owner; cat /etc/metal-to-model 2>/dev/null || true
section applying; systemctl is-active metal-apply.service 2>/dev/null || true
section runs
systemctl list-units 'metal-run-*' --state=active,activating,deactivating,reloading --plain --no-legend 2>/dev/null | awk '{print $1}' | sed 's/^metal-run-//; s/\.service$//' || true
section reboot
[[ -d /usr/lib/modules/$(uname -r)/kernel ]] || echo "the running kernel's modules are gone"
if [[ -e /sys/module/nvidia/version ]]; then
  [[ $(</sys/module/nvidia/version) == $(modinfo --field version nvidia) ]] || echo "another NVIDIA driver is installed than runs"
elif grep -qsx 0x10de /sys/bus/pci/devices/*/vendor && modinfo nvidia > /dev/null 2>&1; then
  echo "the NVIDIA driver is installed and not loaded"
fi
section hostname; cat /proc/sys/kernel/hostname
section os; . /etc/os-release; printf '%s\n' "${ID:-unknown}"
section boot_id; cat /proc/sys/kernel/random/boot_id
section clock; date +%s
section firmware; if [[ -d /sys/firmware/efi/efivars ]]; then echo uefi; else echo bios; fi
section kernel; uname -r
section cpu; awk -F': *' '/^vendor_id/ {print $2; exit}' /proc/cpuinfo
section cpu_model; awk -F': *' '/^model name/ {print $2; exit}' /proc/cpuinfo
section memory; awk '/^MemTotal/ {print $2}' /proc/meminfo
section root
lsblk --inverse --noheadings --raw --output PARTUUID "$(findmnt --nofsroot --noheadings --output SOURCE /)" 2>/dev/null || true
section subvolume; findmnt --noheadings --output FSROOT / || true
section medium
if source=$(findmnt --noheadings --output SOURCE /run/archiso/bootmnt 2>/dev/null); then
  lsblk --inverse --noheadings --raw --paths --output NAME,TYPE "$source" | awk '$2 == "disk" {print $1}'
fi
section lsblk
lsblk --json --bytes --paths --output NAME,TYPE,SIZE,SERIAL,MODEL,RO,FSTYPE,LABEL,UUID,PARTTYPE,PARTUUID,PARTLABEL,MOUNTPOINTS
section by_id; find /dev/disk/by-id -type l -printf '%f %l\n' 2>/dev/null || true
section used
if [[ -d /run/archiso ]]; then
  lsblk --raw --noheadings --paths --output NAME,FSTYPE | sort -u | while read -r device kind; do
    used=$(used_bytes "$device" "$kind" 2>/dev/null) && [[ $used ]] && printf '%s %s\n' "$device" "$used"
  done || true  # the last one may hold nothing
fi
section tpm; cat /sys/class/tpm/tpm0/tpm_version_major 2>/dev/null || true
section holdings
for disk in $(lsblk --nodeps --noheadings --raw --paths --output NAME,TYPE | awk '$2 == "disk" {print $1}'); do
  printf '%s %s\n' "$disk" "$(holdings "$disk" | sha256sum | cut -d' ' -f1)"
done
section blank
for disk in $(lsblk --nodeps --noheadings --raw --paths --output NAME,TYPE | awk '$2 == "disk" {print $1}'); do
  if is_blank "$disk"; then echo "$disk"; fi
done
section gpus
for device in /sys/bus/pci/devices/*; do
  [[ -e $device/vendor && $(<"$device/vendor") == 0x10de ]] || continue
  case $(<"$device/class") in
    0x0300*|0x0302*|0x0380*) printf '%s %s\n' "${device##*/}" "$(<"$device/device")" ;;
  esac
done
section nics
for nic in /sys/class/net/*; do
  [[ -e $nic/device ]] && printf '%s %s\n' "${nic##*/}" "$(<"$nic/address")"
done
section screens
for screen in /sys/class/drm/*/edid; do
  [[ -e $screen && $(<"${screen%edid}status") == connected ]] || continue
  connector=${screen%/edid}
  printf '%s %s\n' "${connector##*/}" "$(base64 --wrap=0 "$screen" || true)"
done
section end
)
"""
)


@dataclass(frozen=True)
class Partition:
    path: str
    size_bytes: int
    filesystem: str  # "" where none was recognised
    label: str
    type_guid: str
    uuid: str  # the partition's own (PARTUUID), lower case
    name: str  # the partition's name in the GPT (PARTLABEL)
    mounted_at: tuple[str, ...]
    filesystem_uuid: str = ""
    used_bytes: int | None = None  # None where it cannot be told without mounting it


@dataclass(frozen=True)
class Disk:
    path: str
    serial: str
    model: str
    size_bytes: int
    read_only: bool
    filesystem: str  # of the disk itself, where it has no partition table
    partitions: tuple[Partition, ...]
    mounted: tuple[str, ...]  # mount points of anything on it, and "[SWAP]"
    stacked: tuple[str, ...]  # device-mapper, md and LVM devices on it
    is_medium: bool  # the install ISO runs from it
    holdings: str  # sha256 of what is on it: see HOLDINGS
    names: tuple[str, ...] = ()  # in /dev/disk/by-id
    empty: bool = False  # nothing that is known begins or ends there: see is_blank of the probe
    filesystem_uuid: str = ""
    used_bytes: int | None = None

    def is_called(self, name: str) -> bool:
        """Whether a person may mean it by that: its serial, or its name in /dev/disk/by-id."""
        return name in (self.serial, *self.names)

    @property
    def in_use(self) -> tuple[str, ...]:
        return (*self.mounted, *self.stacked)

    @property
    def is_blank(self) -> bool:
        return self.empty and not self.partitions and not self.filesystem and not self.in_use


@dataclass(frozen=True)
class GpuSeen:
    slot: str  # PCI address, such as 0000:01:00.0
    device: int  # PCI device id


@dataclass(frozen=True)
class Facts:
    system: Literal["live", "installed", "other"]
    owner: str  # the machine's name as we installed it; "" where we did not
    applying: bool  # an earlier run's Steps are still at work there: its unit outlives the connection
    runs: tuple[str, ...]  # training runs at work
    reboot: tuple[str, ...]  # why it must be rebooted before it is whole
    os: str  # ID of os-release
    hostname: str
    boot_id: str
    clock_s: int  # seconds since the epoch, by the host
    uefi: bool
    kernel: str
    cpu_vendor: str
    cpu_model: str
    memory_bytes: int
    root_partitions: tuple[str, ...]  # PARTUUIDs of the partitions that / lies on
    subvolume: str  # what of its file system / is: /@ with btrfs, else /
    disks: tuple[Disk, ...]
    gpus: tuple[GpuSeen, ...]
    nics: tuple[tuple[str, str], ...]  # (name, MAC address)
    screens: tuple[Screen, ...]
    tpm: int  # its version, 1 or 2; 0 where there is none


def parse_facts(text: str) -> Facts:
    """The probe's output as Facts; ProvisionError where it is cut or not ours."""
    found = split_sections(text)
    if "end" not in found:
        raise ProvisionError("The probe's answer is incomplete.", "Run the command again.")
    one = {name: lines[0] if lines else "" for name, lines in found.items()}
    system = one["system"]
    if system not in ("live", "installed"):
        system = "other"
    seen = Seen(
        medium=frozenset(found["medium"]),
        holdings=dict(map(str.split, found["holdings"])),
        names=parse_names(found["by_id"]),
        blank=frozenset(found["blank"]),
        used_bytes={device: int(used) for device, used in map(str.split, found["used"])},
    )
    return Facts(
        system=system,  # type: ignore[arg-type]
        owner=one["owner"],
        applying=one["applying"] in ("active", "activating"),
        runs=tuple(found["runs"]),
        reboot=tuple(found["reboot"]),
        os=one["os"],
        hostname=one["hostname"],
        boot_id=one["boot_id"],
        clock_s=int(one["clock"]),
        uefi=one["firmware"] == "uefi",
        kernel=one["kernel"],
        cpu_vendor=one["cpu"],
        cpu_model=one["cpu_model"],
        memory_bytes=int(one["memory"]) * 1024,
        root_partitions=tuple(line.lower() for line in found["root"]),
        subvolume=one["subvolume"],
        disks=tuple(parse_disks(json.loads("\n".join(found["lsblk"])), seen)),
        gpus=tuple(GpuSeen(slot, int(device, 16)) for slot, device in map(str.split, found["gpus"])),
        nics=tuple((name, mac) for name, mac in map(str.split, found["nics"])),
        screens=tuple(
            parse_screen(connector, base64.b64decode(edid))
            for connector, _, edid in (line.partition(" ") for line in found["screens"])
        ),
        tpm=int(one["tpm"] or 0),
    )


def split_sections(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("@"):
            lines = found.setdefault(line[1:], [])
        elif line.strip():
            lines.append(line.strip())
    return found


@dataclass(frozen=True)
class Seen:
    """What other sections say of the devices that lsblk lists, by path."""

    medium: frozenset[str]
    holdings: dict[str, str]
    names: dict[str, tuple[str, ...]]
    blank: frozenset[str]
    used_bytes: dict[str, int]


def parse_names(lines: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Device → its names in /dev/disk/by-id, out of lines `NAME ../../DEVICE`."""
    found: dict[str, tuple[str, ...]] = {}
    for line in sorted(lines):
        name, _, place = line.rpartition(" ")
        path = f"/dev/{place.rpartition('/')[2]}"
        found[path] = (*found.get(path, ()), name)
    return found


def parse_disks(tree: dict[str, Any], seen: Seen) -> Iterator[Disk]:
    """Disks of `lsblk --json`; loop devices, optical drives and zram are left out."""
    for node in tree["blockdevices"]:
        if node["type"] != "disk" or node["name"].startswith("/dev/zram"):
            continue
        children = node.get("children", [])
        yield Disk(
            path=node["name"],
            serial=(node["serial"] or "").strip(),
            model=(node["model"] or "").strip(),
            size_bytes=int(node["size"]),
            read_only=bool(node["ro"]),
            filesystem=node["fstype"] or "",
            partitions=tuple(parse_partition(child, seen) for child in children if child["type"] == "part"),
            mounted=tuple(dict.fromkeys(mounts(node))),
            stacked=tuple(dict.fromkeys(stacked(node))),
            is_medium=node["name"] in seen.medium,
            holdings=seen.holdings.get(node["name"], ""),
            names=seen.names.get(node["name"], ()),
            empty=node["name"] in seen.blank,
            filesystem_uuid=node["uuid"] or "",
            used_bytes=seen.used_bytes.get(node["name"]),
        )


def parse_partition(node: dict[str, Any], seen: Seen) -> Partition:
    return Partition(
        path=node["name"],
        size_bytes=int(node["size"]),
        filesystem=node["fstype"] or "",
        label=node["label"] or "",
        type_guid=(node["parttype"] or "").lower(),
        uuid=(node["partuuid"] or "").lower(),
        name=node["partlabel"] or "",
        mounted_at=tuple(mount for mount in node["mountpoints"] if mount),
        filesystem_uuid=node["uuid"] or "",
        used_bytes=seen.used_bytes.get(node["name"]),
    )


def mounts(node: dict[str, Any]) -> Iterator[str]:
    """Where a device and all that is stacked on it is mounted; "[SWAP]" for swap in use."""
    yield from (mount for mount in node["mountpoints"] if mount)
    for child in node.get("children", []):
        yield from mounts(child)


def stacked(node: dict[str, Any]) -> Iterator[str]:
    """Devices made of this one: opened LUKS volumes, LVM, md arrays."""
    for child in node.get("children", []):
        if child["type"] not in ("part", "disk"):
            yield child["name"]
        yield from stacked(child)
