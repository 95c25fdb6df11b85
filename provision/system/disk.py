"""Partitions and file systems of the one disk that the machine file names by its serial number.

The partitions' own ids (PARTUUID) are computed from the machine's name and the disk's serial. So they are known
before they exist: /etc/fstab and the boot entry name them, and a disk that carries them is ours, for this machine.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from shlex import quote

from provision.errors import ProvisionError
from provision.facts import HOLDINGS, Disk, Facts
from provision.machine import Machine
from provision.steps import BASE_COMPLETE, File, Script, Step

# Discoverable Partitions Specification: https://uapi-group.org/specifications/specs/discoverable_partitions_specification/
ESP_TYPE = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
ROOT_TYPE = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"  # root, x86-64
MOUNT = "/mnt"
ESP_OPTIONS = "fmask=0077,dmask=0077"  # FAT keeps no modes: nobody but root may read the ESP


@dataclass(frozen=True)
class Layout:
    """Devices of the machine's two partitions, by the ids that we give them."""

    esp_uuid: str
    root_uuid: str

    @property
    def esp(self) -> str:
        return f"/dev/disk/by-partuuid/{self.esp_uuid}"

    @property
    def root(self) -> str:
        return f"/dev/disk/by-partuuid/{self.root_uuid}"

    @property
    def probe_mounts(self) -> tuple[tuple[str, str, str], ...]:
        """How a probe looks into a half-installed disk: read-only, and without replaying the journal."""
        return ((self.root, MOUNT, "ro,noload"), (self.esp, f"{MOUNT}/boot", f"ro,{ESP_OPTIONS}"))


def layout(machine: Machine) -> Layout:
    def partition(kind: str) -> str:
        return str(
            uuid.uuid5(uuid.NAMESPACE_URL, f"metal-to-model:{machine.name}:{machine.disk.serial}:{kind}")
        )

    return Layout(partition("esp"), partition("root"))


def find_disk(machine: Machine, facts: Facts) -> Disk:
    """The disk with the machine file's serial; ProvisionError unless there is exactly one that can be used."""
    wanted = machine.disk.serial
    matching = [disk for disk in facts.disks if disk.serial == wanted]
    if not matching:
        raise ProvisionError(
            f"No disk with serial {wanted!r}, which disk.serial of machine '{machine.name}' names.\n"
            f"Disks of the machine:\n{describe_disks(facts)}",
            f"Put the right serial into the machine file, then: fab -H {machine.name} plan",
        )
    if len(matching) > 1:
        paths = ", ".join(disk.path for disk in matching)
        raise ProvisionError(
            f"Serial {wanted!r} belongs to {len(matching)} disks: {paths}. Which one is meant cannot be told."
        )
    disk = matching[0]
    if disk.is_medium:
        raise ProvisionError(
            f"{disk.path} (serial {wanted}) is the install medium itself.", "Name another disk."
        )
    if disk.read_only:
        raise ProvisionError(f"{disk.path} (serial {wanted}) is read-only.")
    if disk.size_bytes < 4 * 2**30 + machine.disk.esp_mib * 2**20:
        raise ProvisionError(
            f"{disk.path} holds {gibibytes(disk.size_bytes)}, which is too small for a system."
        )
    return disk


def is_ours(machine: Machine, disk: Disk) -> bool:
    """True where the disk has the two partitions that we make on it for this machine: it is not partitioned again."""
    ids = layout(machine)
    return {(ids.esp_uuid, ESP_TYPE), (ids.root_uuid, ROOT_TYPE)} <= {
        (part.uuid, part.type_guid) for part in disk.partitions
    }


def would_lose(machine: Machine, facts: Facts) -> str:
    """What a first installation destroys, for a person to read; "" where the disk is blank or already ours."""
    if facts.system != "live":
        return ""
    disk = find_disk(machine, facts)
    return "" if disk.is_blank or is_ours(machine, disk) else describe_disk(disk)


def disk(machine: Machine, facts: Facts) -> Iterator[Step]:
    """GPT with an EFI system partition and a root, made once; mounted below /mnt while installing."""
    ids = layout(machine)
    if facts.system == "live":
        target = find_disk(machine, facts)
        if target.in_use and not is_ours(machine, target):
            raise ProvisionError(
                f"{target.path} (serial {target.serial}) is in use: {', '.join(target.in_use)}.\n{describe_disk(target)}",
                "Free it on the ISO (umount, swapoff -a, vgchange -an, mdadm --stop --scan), or name another disk.",
            )
        yield partition(machine, target, ids)
        yield format_partition("ESP", ids.esp, "vfat", "mkfs.fat -F 32 -n ESP")
        yield format_partition(
            "root", ids.root, machine.disk.filesystem, f"mkfs.{machine.disk.filesystem} -q -L root"
        )
        yield Script(
            f"mount {MOUNT}",
            why="the new system is built below it",
            # An unfinished root is mounted anew, without whatever a cut-off pacstrap left mounted in it.
            probe=f'[[ $mounted == yes && -e "$root"{BASE_COMPLETE} ]] &&'
            f" findmnt --noheadings --output PARTUUID {MOUNT} && findmnt --noheadings --output PARTUUID {MOUNT}/boot",
            expect=f"{ids.root_uuid}\n{ids.esp_uuid}",
            script=f"if mountpoint -q {MOUNT}; then umount --recursive {MOUNT}; fi\n"
            f"mount {ids.root} {MOUNT}\nmkdir -p {MOUNT}/boot\nmount -o {ESP_OPTIONS} {ids.esp} {MOUNT}/boot",
        )


def fstab(machine: Machine, facts: Facts) -> Iterator[Step]:
    ids = layout(machine)
    yield File(
        "/etc/fstab",
        "# <device> <folder> <type> <options> <dump> <check>\n"
        f"PARTUUID={ids.root_uuid} / {machine.disk.filesystem} rw,relatime 0 1\n"
        f"PARTUUID={ids.esp_uuid} /boot vfat rw,relatime,{ESP_OPTIONS} 0 2\n",
        why="mounts by the ids that we gave the partitions, whatever the kernel calls the disk",
        then='findmnt --verify --tab-file "$root/etc/fstab"',
    )


def partition(machine: Machine, target: Disk, ids: Layout) -> Step:
    """Wipe and partition, guarded once more on the host: serial, size, contents and use as they were planned."""
    size = gibibytes(target.size_bytes)
    guard = (
        HOLDINGS
        + f"""
disk={quote(target.path)}
refuse() {{ echo "refused to wipe $disk: $1"; exit 1; }}
serial=$(lsblk --nodeps --noheadings --output SERIAL "$disk" | xargs)
[[ $serial == {quote(target.serial)} ]] || refuse "its serial is '$serial', not {target.serial}"
[[ $(blockdev --getsize64 "$disk") == {target.size_bytes} ]] || refuse "its size changed"
[[ $(holdings "$disk" | sha256sum | cut -d' ' -f1) == {target.holdings} ]] || refuse "what it holds changed since it was planned"
[[ -z $(lsblk --noheadings --output MOUNTPOINTS "$disk" | xargs) ]] || refuse "something on it is mounted"
medium=$(findmnt --noheadings --output SOURCE /run/archiso/bootmnt || true)
[[ -z $medium ]] || ! lsblk --noheadings --raw --paths --output NAME "$disk" | grep -qxF "$medium" || refuse "it is the install medium"
"""
    )
    make = f"""
for part in $(lsblk --noheadings --raw --paths --output NAME "$disk" | tail -n +2); do wipefs --all --force "$part"; done
wipefs --all --force "$disk"
sgdisk --zap-all "$disk" > /dev/null
sgdisk --new=1:0:+{machine.disk.esp_mib}M --typecode=1:{ESP_TYPE} --partition-guid=1:{ids.esp_uuid} --change-name=1:ESP \\
       --new=2:0:0 --typecode=2:{ROOT_TYPE} --partition-guid=2:{ids.root_uuid} --change-name=2:root "$disk"
partprobe "$disk"
udevadm settle --timeout=30
for part in {ids.esp} {ids.root}; do
  [[ -b $part ]] || {{ echo "$part did not appear"; exit 1; }}
  wipefs --all --force $part  # what an older layout left at the same place
done
"""
    return Script(
        f"partition {target.path}",
        why=f"serial {target.serial}, {target.model or 'no model name'}, {size}: EFI system partition of "
        f"{machine.disk.esp_mib} MiB, root in the rest; now on it: {describe_contents(target)}",
        probe=f"for id in {ids.esp_uuid} {ids.root_uuid}; do [[ -b /dev/disk/by-partuuid/$id ]] || exit; done; echo yes",
        script=guard + make,
    )


def format_partition(name: str, device: str, filesystem: str, mkfs: str) -> Step:
    """A file system where there is none. One that is there, of any kind, is never replaced: it may hold a home."""
    kind = f"blkid --probe --match-tag TYPE --output value {device} || true"
    return Script(
        f"format {name}",
        why=f"{filesystem} on the new partition",
        probe=kind,
        expect=filesystem,
        script=f"kind=$({kind})\n"
        f'[[ -z $kind ]] || {{ echo "{device} holds $kind, not {filesystem}; to lose it: wipefs --all {device}"; exit 1; }}\n'
        f"{mkfs} {device}\nudevadm settle --timeout=30",
    )


def describe_contents(target: Disk) -> str:
    if target.is_blank:
        return "nothing"
    return ", ".join(
        [*([target.filesystem] if target.filesystem and not target.partitions else [])]
        + [
            f"{part.path} {part.filesystem or 'unformatted'} {part.label or part.name}".strip()
            for part in target.partitions
        ]
    )


def describe_disk(target: Disk) -> str:
    lines = [
        f"{target.path}  serial {target.serial or '(none)'}  {gibibytes(target.size_bytes)}  {target.model}".rstrip()
    ]
    if target.is_medium:
        lines[0] += "  (install medium)"
    if target.filesystem and not target.partitions:
        lines.append(f"  whole disk: {target.filesystem}")
    for part in target.partitions:
        names = " ".join(filter(None, [part.filesystem or "unformatted", part.label, part.name]))
        lines.append(
            f"  {part.path}  {gibibytes(part.size_bytes)}  {names}  {' '.join(part.mounted_at)}".rstrip()
        )
    return "\n".join(lines)


def describe_disks(facts: Facts) -> str:
    return "\n".join(describe_disk(disk) for disk in facts.disks) or "  none"


def gibibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
