"""More disks, mounted where the machine file says. Only a blank one is ever formatted."""

from collections.abc import Iterator
from dataclasses import dataclass
from shlex import quote

from provision.errors import ProvisionError
from provision.facts import HOLDINGS, Disk, Facts
from provision.machine import Machine
from provision.steps import Script, Step
from provision.system.inventory import describe_disk, find_disk, gibibytes
from provision.system.layout import DATA_OPTIONS, DATA_TYPE, LOOK, Mount, identify, show_filesystem

NO_FILE_SYSTEM = ("", "swap", "LVM2_member", "linux_raid_member", "crypto_LUKS", "zfs_member")


@dataclass(frozen=True)
class Wanted:
    """One data disk: where it is mounted and from what, and whether it must be formatted first."""

    disk: Disk
    folder: str
    source: str
    partition_uuid: str  # what we call the partition that we make on a blank one
    blank: bool

    @property
    def ours(self) -> bool:
        return self.source.startswith("PARTUUID=")


def data_disks(machine: Machine, facts: Facts) -> Iterator[Wanted]:
    """Raises ProvisionError for a disk that is missing, or holds something of which it is not clear what to mount."""
    own = [("disk.serial", machine.disk.serial), ("disk.mirror", machine.disk.mirror)]
    taken = {find_disk(machine, facts, serial, setting).path for setting, serial in own if serial}
    for serial, folder in machine.disk.data_disks:
        seen = find_disk(machine, facts, serial, "disk.data")
        if seen.path in taken:
            raise ProvisionError(
                f"disk.data: {serial} is {seen.path}, which the machine file names elsewhere too.",
                "Name each disk once.",
            )
        taken.add(seen.path)
        uuid = identify(machine, serial, "data")
        if seen.is_blank or any(part.uuid == uuid for part in seen.partitions):
            yield Wanted(seen, folder, f"PARTUUID={uuid}", uuid, seen.is_blank)
            continue
        found = [(part.filesystem, part.filesystem_uuid) for part in seen.partitions]
        if not found:
            found = [(seen.filesystem, seen.filesystem_uuid)]
        usable = [ident for kind, ident in found if ident and kind not in NO_FILE_SYSTEM]
        if len(usable) != 1:
            raise ProvisionError(
                f"disk.data: on {seen.path} (serial {serial}) there are {len(usable)} file systems; which one belongs at "
                f"{folder} cannot be told. It is never formatted, since it is not blank.\n{describe_disk(seen)}",
                f"If all of it may go, make it blank on {facts.hostname}: wipefs --all {' '.join([*(part.path for part in seen.partitions), seen.path])}",
            )
        yield Wanted(seen, folder, f"UUID={usable[0]}", uuid, False)


def data_mounts(machine: Machine, facts: Facts) -> list[Mount]:
    """Lines of /etc/fstab; on the installed system only, so that nothing of it can keep a new one from booting."""
    if facts.system != "installed":
        return []
    return [
        Mount(
            wanted.source,
            wanted.folder,
            "ext4" if wanted.ours else "auto",
            f"defaults,{DATA_OPTIONS}",
            2 if wanted.ours else 0,
        )
        for wanted in data_disks(machine, facts)
    ]


def data(machine: Machine, facts: Facts) -> Iterator[Step]:
    """Before the lines of /etc/fstab: what they name must exist."""
    for wanted in data_disks(machine, facts):  # on the ISO too, for what it refuses
        if facts.system != "installed":
            continue
        if wanted.ours:
            yield format_blank(machine, wanted)
        yield Script(
            f"folder {wanted.folder}",
            why=f"{wanted.disk.path} is mounted there",
            probe=f"test -d {wanted.folder} && echo yes",
            script=f"mkdir -p {wanted.folder}",
        )


def mount_data(machine: Machine, facts: Facts) -> Iterator[Step]:
    """By the lines of /etc/fstab."""
    if facts.system == "installed":
        for wanted in data_disks(machine, facts):
            yield mount(machine, wanted)


def format_blank(machine: Machine, wanted: Wanted) -> Step:
    seen = wanted.disk
    device = f"/dev/disk/by-partuuid/{wanted.partition_uuid}"
    name = f"data@{machine.name}"[:36]
    return Script(
        f"data disk {seen.path}",
        why=f"serial {seen.serial}, {seen.model or 'no model name'}, {gibibytes(seen.size_bytes)}, blank: ext4 for {wanted.folder}",
        probe=f"[[ -b {device} ]] && blkid --probe --match-tag TYPE --output value {device}",
        expect="ext4",
        script=f"""{HOLDINGS}{LOOK}
disk={quote(seen.path)}
refuse() {{ echo "refused to format $disk: $1"; exit 1; }}
if [[ ! -b {device} ]]; then
  serial=$(lsblk --nodeps --noheadings --output SERIAL "$disk" | sed 's/^ *//; s/ *$//')
  [[ $serial == {quote(seen.serial)} ]] || refuse "its serial is '$serial'"
  [[ $(blockdev --getsize64 "$disk") == {seen.size_bytes} ]] || refuse "its size changed"
  is_blank "$disk" || refuse "it is not blank; if what it holds may go: blkdiscard --force $disk, or dd if=/dev/zero of=$disk"
  sfdisk --quiet "$disk" <<< $'label: gpt\\ntype={DATA_TYPE}, uuid={wanted.partition_uuid}, name={name}'
  udevadm settle --timeout=30
fi
seen=$(look {device})
[[ $seen == blank ]] || refuse "its partition holds $seen"
mkfs.ext4 -q -L data {device}
{show_filesystem(device)}""",
    )


def mount(machine: Machine, wanted: Wanted) -> Step:
    """A new one belongs to the person; what was on another keeps its owners."""
    folder, tag = quote(wanted.folder), wanted.source.partition("=")[0]
    own = f"[[ -n $(find {folder} -mindepth 1 ! -name lost+found -print -quit) ]] || chown {machine.user.name}: {folder}\n"
    return Script(
        f"mount {wanted.folder}",
        why=f"{wanted.disk.path}, serial {wanted.disk.serial}",
        probe=f"findmnt --noheadings --output {tag} --mountpoint {folder}",
        expect=wanted.source.partition("=")[2],
        script=f"systemctl daemon-reload\nmount {folder}\n{own if wanted.ours else ''}",
    )
