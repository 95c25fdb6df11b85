"""What stands between a person and the loss of a disk: whose it is, what is refused, and the script that wipes."""

from collections.abc import Iterator, Sequence
from shlex import quote

from provision.errors import ProvisionError
from provision.facts import HOLDINGS, Disk, Facts
from provision.machine import Machine
from provision.steps import Script, Step
from provision.system.inventory import describe_contents, describe_disk, describe_disks, gibibytes
from provision.system.layout import MOUNT, Layout, Part, identify, layout

TAKE_APART = r"""
take_apart() {  # NODE KIND: unmount it, swap off, close it
  local folder
  [[ -b $1 ]] || return 0
  ! grep -q "^$(readlink -f "$1") " /proc/swaps || swapoff "$1"
  lsblk --nodeps --noheadings --output MOUNTPOINTS "$1" | tac | while read -r folder; do
    if [[ $folder ]] && mountpoint -q "$folder"; then umount --recursive "$folder"; fi
  done
  case $2 in
    crypt) cryptsetup close "$1" ;;
    lvm) lvchange --activate n "$1" ;;
    raid*|linear) mdadm --quiet --stop "$1" ;;
    dm|mpath) dmsetup remove "$1" ;;
  esac
}
"""


def is_ours(parts: Sequence[Part], disk: Disk) -> bool:
    """True where the disk has the partitions that we make on it for this machine: it is not partitioned again."""
    return {(part.uuid, part.type_guid) for part in parts} <= {
        (part.uuid, part.type_guid) for part in disk.partitions
    }


def was_ours(parts: Sequence[Part], disk: Disk) -> bool:
    """True where we laid it out for this machine before, if not as its file says now: what is mounted of it may go."""
    return any(part.kind == "esp" and is_ours((part,), disk) for part in parts)


def demand_no_copies(machine: Machine, facts: Facts) -> None:
    """Refuse while a disk that is not named carries our partitions' ids: a copy of ours would be written to in its place."""
    known = [part.uuid for part in layout(machine).parts]
    data = [serial for serial, _ in machine.disk.data_disks]
    known += [identify(machine, serial, "data") for serial in data]
    named = [*machine.disk.system_serials, *data]
    for uuid in known:
        carrying = [disk for disk in facts.disks if any(part.uuid == uuid for part in disk.partitions)]
        strange = [disk for disk in carrying if not any(map(disk.is_called, named))]
        if strange or len(carrying) > 1:
            raise ProvisionError(
                f"Another disk carries the ids of machine '{machine.name}' too, as a copy of its disk does; which one is meant "
                f"cannot be told by them:\n" + "\n".join(map(describe_disk, strange or carrying)),
                "Unplug the copy, or give it other ids: sgdisk --randomize-guids DISK",
            )


def demand_free(parts: Sequence[Part], seen: Disk, facts: Facts, targets: Sequence[Disk]) -> None:
    """Refuse a disk that somebody uses, unless it is our own for this machine."""
    if seen.mounted and not was_ours(parts, seen):
        raise ProvisionError(
            f"{seen.path} (serial {seen.serial}) is in use: {', '.join(seen.mounted)}.\n{describe_disk(seen)}",
            "Free it on the ISO (umount, swapoff -a), or name another disk.",
        )
    for other in facts.disks:
        shared = set(seen.stacked) & set(other.stacked)
        if shared and other not in targets:
            raise ProvisionError(
                f"{', '.join(sorted(shared))} lies on {seen.path} (serial {seen.serial}) and on {other.path} too, which is not named.\n"
                f"{describe_disks(facts)}",
                "Take it apart on the ISO first (vgchange -an, mdadm --stop), if that is meant.",
            )


def free(ids: Layout, seen: Disk) -> Iterator[Step]:
    """What an earlier attempt or a person left in use of our own disk: mounts elsewhere, swap, other mappings.

    Planned only while there is something: so the probe never says done, and a plan made afterwards lacks it.
    """
    ours = {f"/dev/mapper/{part.mapper}" for part in ids.encrypted}
    folders = [folder for folder in seen.mounted if folder != MOUNT and not folder.startswith(f"{MOUNT}/")]
    nodes = [node for node in reversed(seen.stacked) if node not in ours]
    if not folders and not nodes:
        return
    lines = [f"umount --recursive {quote(folder)}" for folder in folders if folder != "[SWAP]"]
    if "[SWAP]" in folders:
        lines += [
            f"for node in $(lsblk --raw --noheadings --paths --output NAME {quote(seen.path)}); do",
            '  ! grep -q "^$(readlink -f "$node") " /proc/swaps || swapoff "$node"',
            "done",
        ]
    lines += [
        f'take_apart {quote(node)} "$(lsblk --nodeps --noheadings --raw --output TYPE {quote(node)})"'
        for node in nodes
    ]
    yield Script(
        f"free {seen.path}",
        why=f"left in use by an earlier attempt: {', '.join([*folders, *nodes])}",
        probe="true",
        script=TAKE_APART + "\n".join(lines),
    )


def partition(parts: Sequence[Part], seen: Disk, swap_size_mib: int) -> Step:
    """Wipe and partition. Where the plan found the disk laid out already, it is never wiped, whatever a later look says."""
    links = " ".join(part.path for part in parts)
    return Script(
        f"partition {seen.path}",
        why=f"serial {seen.serial}, {seen.model or 'no model name'}, {gibibytes(seen.size_bytes)}: "
        f"{', '.join(describe_part(part, swap_size_mib) for part in parts)}; now on it: {describe_contents(seen)}",
        probe=f"for part in {links}; do\n"
        f'  [[ -b $part && $(lsblk --nodeps --noheadings --paths --output PKNAME "$part") == {quote(seen.path)} ]] || exit\n'
        "done\necho yes",
        script=WAIT_FOR_LINKS.format(links=links)
        if is_ours(parts, seen)
        else wipe(parts, seen, swap_size_mib),
    )


WAIT_FOR_LINKS = """udevadm trigger --subsystem-match=block
udevadm settle --timeout=30
for part in {links}; do
  [[ -b $part ]] || {{ echo "the disk has our partitions, but udev does not show $part"; exit 1; }}
done"""


def wipe(parts: Sequence[Part], seen: Disk, swap_size_mib: int) -> str:
    """Guarded once more on the host: serial, size, contents and use as they were planned."""
    links = " ".join(part.path for part in parts)
    ours = "yes" if was_ours(parts, seen) else "no"
    lines = [
        HOLDINGS + TAKE_APART,
        f"disk={quote(seen.path)}",
        'refuse() { echo "refused to wipe $disk: $1"; exit 1; }',
        """serial=$(lsblk --nodeps --noheadings --output SERIAL "$disk" | sed 's/^ *//; s/ *$//')""",
        f"[[ $serial == {quote(seen.serial)} ]] || refuse \"its serial is '$serial'\"",
        f'[[ $(blockdev --getsize64 "$disk") == {seen.size_bytes} ]] || refuse "its size changed"',
        f'[[ $(holdings "$disk" | sha256sum | cut -d" " -f1) == {seen.holdings} ]] || refuse "what it holds changed since it was planned"',
        """mounted=$(lsblk --noheadings --output MOUNTPOINTS "$disk" | sed '/^ *$/d' | paste -sd ' ')""",
        f'[[ -z $mounted || {ours} == yes ]] || refuse "something on it is in use: $mounted"',
        "medium=$(findmnt --noheadings --output SOURCE /run/archiso/bootmnt || true)",
        'nodes=$(lsblk --noheadings --raw --paths --output NAME "$disk")',
        "[[ -z $medium || $'\\n'$nodes$'\\n' != *$'\\n'$medium$'\\n'* ]] || refuse \"it is the install medium\"",
    ]
    if parts[0].serial != seen.serial:
        link = quote(f"/dev/disk/by-id/{parts[0].serial}")
        lines.append(
            f'[[ $(readlink -f {link}) == "$disk" ]] || refuse "it has another name in /dev/disk/by-id"'
        )
    if seen.is_blank:
        lines.append('is_blank "$disk" || refuse "it is not blank any more"')
    make = ["sgdisk"]
    for number, part in enumerate(parts, 1):
        size_mib = size_of(part, swap_size_mib)
        make.append(
            f"--new={number}:0:{f'+{size_mib}M' if size_mib else '0'} --typecode={number}:{part.type_guid}"
            f" --partition-guid={number}:{part.uuid} --change-name={number}:{quote(part.name)}"
        )
    lines.append(
        f"""lsblk --raw --noheadings --paths --output NAME,TYPE "$disk" | tac | while read -r node kind; do take_apart "$node" "$kind"; done
for part in $(lsblk --noheadings --raw --paths --output NAME "$disk" | tail -n +2); do wipefs --all --force "$part"; done
wipefs --all --force "$disk"
sgdisk --zap-all "$disk" > /dev/null
{" ".join(make)} "$disk"
partprobe "$disk"
udevadm settle --timeout=30
for part in {links}; do
  [[ -b $part ]] || {{ echo "$part did not appear"; exit 1; }}
  wipefs --all --force $part  # what an older layout left at the same place
done"""
    )
    return "\n".join(lines)


def size_of(part: Part, swap_size_mib: int) -> int:
    """In MiB; 0: what is left."""
    return part.size_mib or (swap_size_mib if part.kind == "swap" else 0)


def describe_part(part: Part, swap_size_mib: int) -> str:
    kind = {"esp": "EFI system partition"}.get(part.kind, part.kind)
    size_mib = size_of(part, swap_size_mib)
    size = f"{size_mib} MiB" if size_mib < 8192 else f"{size_mib // 1024} GiB"
    return f"{kind} of {size}" if size_mib else f"{kind} in the rest"
