"""The disk that the machine file names, and its mirror: found, described, partitioned, formatted, mounted."""

from collections.abc import Iterator
from shlex import quote

from provision.errors import ProvisionError
from provision.facts import HOLDINGS, Disk, Facts
from provision.machine import Machine
from provision.steps import BASE_COMPLETE, File, Script, Step
from provision.system.crypt import volumes
from provision.system.data import data_mounts
from provision.system.inventory import describe_contents, describe_disk, describe_disks, find_disk, gibibytes
from provision.system.layout import MOUNT, SWAP_FILE, Layout, Part, layout, target

LEAST_BYTES = 4 * 2**30


def find_disks(machine: Machine, facts: Facts) -> tuple[Disk, ...]:
    """The disk to install on, and the mirror where there is one; ProvisionError unless they can be used."""
    disk = machine.disk
    demand_whole_mirror(machine, facts)
    found = [find_disk(machine, facts, disk.serial, "disk.serial")]
    if disk.size_gib and round(found[0].size_bytes / 2**30) != disk.size_gib:
        raise ProvisionError(
            f"{found[0].path} (serial {disk.serial}) holds {gibibytes(found[0].size_bytes)}, and disk.size_gib of machine "
            f"'{machine.name}' says {disk.size_gib}.",
            f"Is it the disk that you mean? If so, correct the machine file, then: fab -H {machine.name} plan",
        )
    if disk.mirror:
        found.append(find_disk(machine, facts, disk.mirror, "disk.mirror"))
        if found[0] == found[1]:
            raise ProvisionError(f"disk.serial and disk.mirror name the same disk, {found[0].path}.")
    needed = LEAST_BYTES + (disk.esp_mib + disk.root_gib * 1024 + swap_mib(machine, facts)) * 2**20
    for seen in found:
        if seen.size_bytes < needed:
            raise ProvisionError(
                f"{seen.path} holds {gibibytes(seen.size_bytes)}, which is too small for what [disk] of the machine file asks for: "
                f"{gibibytes(needed)}."
            )
    return tuple(found)


def demand_whole_mirror(machine: Machine, facts: Facts) -> None:
    """Refuse an installed machine that runs without a disk of its mirror: /boot may be missing with it."""
    wanted = [serial for serial in (machine.disk.serial, machine.disk.mirror) if serial]
    gone = [
        serial for serial in wanted if not any(serial in (disk.serial, *disk.names) for disk in facts.disks)
    ]
    if machine.disk.mirror and facts.system == "installed" and len(gone) == 1:
        raise ProvisionError(
            f"{facts.hostname} runs without a disk of its mirror: serial {gone[0]} is gone. What is on the other is whole.\n"
            f"Disks of the machine:\n{describe_disks(facts)}",
            "Plug it in again, and: btrfs scrub start /. With a new disk: fetch what must not be lost, then install anew from the ISO.",
        )


def swap_mib(machine: Machine, facts: Facts) -> int:
    """Size of swap on the disk, in MiB."""
    disk = machine.disk
    if disk.swap not in ("partition", "file"):
        return 0
    return disk.swap_gib * 1024 or facts.memory_bytes // 2**21


def pairs(machine: Machine, facts: Facts) -> list[tuple[tuple[Part, ...], Disk]]:
    """Each disk with the partitions that belong on it."""
    serials = filter(None, (machine.disk.serial, machine.disk.mirror))
    return [
        (layout(machine).on(serial), disk)
        for serial, disk in zip(serials, find_disks(machine, facts), strict=True)
    ]


def is_ours(parts: tuple[Part, ...], disk: Disk) -> bool:
    """True where the disk has the partitions that we make on it for this machine: it is not partitioned again."""
    return {(part.uuid, part.type_guid) for part in parts} <= {
        (part.uuid, part.type_guid) for part in disk.partitions
    }


def was_ours(parts: tuple[Part, ...], disk: Disk) -> bool:
    """True where we laid it out for this machine before, if not as its file says now: what is mounted of it may go."""
    return any(part.kind == "esp" and is_ours((part,), disk) for part in parts)


def losing(machine: Machine, facts: Facts) -> list[Disk]:
    """The disks that a first installation empties of something; none where they are blank or already ours."""
    if facts.system != "live":
        return []
    return [disk for parts, disk in pairs(machine, facts) if not disk.is_blank and not is_ours(parts, disk)]


def would_lose(machine: Machine, facts: Facts) -> str:
    """What a first installation destroys, for a person to read."""
    return "\n".join(map(describe_disk, losing(machine, facts)))


def disk(machine: Machine, facts: Facts) -> Iterator[Step]:
    """Partitions, encrypted volumes and file systems, made once; mounted below /mnt while installing."""
    if facts.system != "live":
        return
    ids, targets = layout(machine), find_disks(machine, facts)
    for parts, seen in pairs(machine, facts):
        demand_free(parts, seen, facts, targets)
        if is_ours(parts, seen) and (leftovers := leftovers_on(ids, seen)):
            yield release(seen, leftovers)
        yield partition(parts, seen, swap_mib(machine, facts))
    yield from volumes(machine, facts)
    for part in ids.of("esp"):
        yield make_filesystem(
            f"ESP of {part.serial}" if machine.disk.mirror else "ESP",
            (part.device,),
            "vfat",
            "mkfs.fat -F 32 -n ESP",
        )
    for part in ids.of("swap"):
        if machine.disk.encryption == "none":
            yield make_filesystem("swap", (part.device,), "swap", "mkswap -q")
    roots = tuple(part.device for part in ids.of("root"))
    yield make_filesystem("root", roots, machine.disk.filesystem, make_root(machine, ids))
    for part in ids.of("home"):
        yield make_filesystem(
            "home", (part.device,), "ext4", f"mkfs.ext4 -q -L home -U {ids.home_filesystem}"
        )
    yield mount(ids)


def make_root(machine: Machine, ids: Layout) -> str:
    if machine.disk.filesystem == "ext4":
        return f"mkfs.ext4 -q -L root -U {ids.root_filesystem}"
    mirrored = " --metadata raid1 --data raid1" if machine.disk.mirror else ""
    return f"mkfs.btrfs -q --label root --uuid {ids.root_filesystem}{mirrored}"


def mount(ids: Layout) -> Step:
    """All file systems of the new system below /mnt, and before it the subvolumes that are missing."""
    lines = [f"if mountpoint -q {MOUNT}; then umount --recursive {MOUNT}; fi"]
    root = ids.mounts[0]
    if ids.subvolumes:
        lines += [
            f"mount -o subvolid=5 {root.device} {MOUNT}",
            *(f"[[ -d {MOUNT}/{name} ]] || btrfs subvolume create {MOUNT}/{name}" for name in ids.subvolumes),
            f"umount {MOUNT}",
        ]
    for wanted in ids.mounts:
        folder = target(wanted)
        lines += [
            *([f"mkdir -p {folder}"] if wanted is not root else []),
            f"mount -o {wanted.options} {wanted.device} {folder}",
        ]
    looks = [
        f"findmnt --noheadings --output {wanted.source.partition('=')[0]} --mountpoint {target(wanted)}"
        for wanted in ids.mounts
    ]
    return Script(
        f"mount {MOUNT}",
        why="the new system is built below it",
        # An unfinished root is mounted anew, without whatever a cut-off pacstrap left mounted in it.
        probe=f'[[ $mounted == yes && -e "$root"{BASE_COMPLETE} ]] &&\n' + " &&\n".join(looks),
        expect="\n".join(wanted.source.partition("=")[2] for wanted in ids.mounts),
        script="\n".join(lines),
    )


def fstab(machine: Machine, facts: Facts) -> Iterator[Step]:
    ids = layout(machine)
    lines = ["# <device> <folder> <type> <options> <dump> <check>"]
    for wanted in (*ids.mounts, *data_mounts(machine, facts)):
        lines.append(f"{wanted.source} {wanted.folder} {wanted.filesystem} {wanted.options} 0 {wanted.check}")
    for part in ids.of("swap"):
        encrypted = machine.disk.encryption == "luks"
        device = "/dev/mapper/swap" if encrypted else f"PARTUUID={part.uuid}"
        lines.append(f"{device} none swap {'nofail' if machine.disk.mirror else 'defaults'} 0 0")
    if machine.disk.swap == "file":
        lines.append(f"{SWAP_FILE} none swap defaults 0 0")
    yield File(
        "/etc/fstab",
        "".join(f"{line}\n" for line in lines),
        why="mounts by the ids that we gave the partitions, whatever the kernel calls the disk",
        then="in_target findmnt --verify",
    )


# --- wiping -------------------------------------------------------------------------------------------------

RELEASE = r"""
release() {  # DISK: take apart whatever lies on it, from the top down
  local node kind folder
  lsblk --raw --noheadings --paths --output NAME,TYPE "$1" | tac | while read -r node kind; do
    [[ -b $node ]] || continue
    ! grep -q "^$(readlink -f "$node") " /proc/swaps || swapoff "$node"
    lsblk --nodeps --raw --noheadings --output MOUNTPOINTS "$node" | tac | while read -r folder; do
      folder=$(printf '%b' "$folder")
      if [[ $folder ]] && mountpoint -q "$folder"; then umount --recursive "$folder"; fi
    done
    case $kind in
      crypt) cryptsetup close "$node" ;;
      lvm) lvchange --activate n "$node" ;;
      raid*|linear) mdadm --quiet --stop "$node" ;;
      dm|mpath) dmsetup remove "$node" ;;
    esac
  done
}
"""


def demand_free(parts: tuple[Part, ...], seen: Disk, facts: Facts, targets: tuple[Disk, ...]) -> None:
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


def leftovers_on(ids: Layout, seen: Disk) -> list[str]:
    """What an earlier attempt or a person left in use of our own disk: mounts elsewhere, swap, other mappings."""
    ours = {f"/dev/mapper/{part.mapper}" for part in ids.encrypted}
    elsewhere = [folder for folder in seen.mounted if folder != MOUNT and not folder.startswith(f"{MOUNT}/")]
    return [*elsewhere, *(node for node in seen.stacked if node not in ours)]


def release(seen: Disk, leftovers: list[str]) -> Step:
    """Planned only while there is something: so the probe never says done, and a plan made afterwards lacks it."""
    return Script(
        f"free {seen.path}",
        why=f"left in use by an earlier attempt: {', '.join(leftovers)}",
        probe="true",
        script=f"{RELEASE}release {quote(seen.path)}",
    )


def partition(parts: tuple[Part, ...], seen: Disk, swap_size_mib: int) -> Step:
    """Wipe and partition, guarded once more on the host: serial, size, contents and use as they were planned."""
    ours = "yes" if was_ours(parts, seen) else "no"
    guard = (
        HOLDINGS
        + RELEASE
        + f"""
disk={quote(seen.path)}
refuse() {{ echo "refused to wipe $disk: $1"; exit 1; }}
serial=$(lsblk --nodeps --noheadings --output SERIAL "$disk" | xargs)
[[ $serial == {quote(seen.serial)} ]] || refuse "its serial is '$serial', not {seen.serial}"
[[ $(blockdev --getsize64 "$disk") == {seen.size_bytes} ]] || refuse "its size changed"
[[ $(holdings "$disk" | sha256sum | cut -d' ' -f1) == {seen.holdings} ]] || refuse "what it holds changed since it was planned"
mounted=$(lsblk --noheadings --output MOUNTPOINTS "$disk" | xargs)
[[ -z $mounted || {ours} == yes ]] || refuse "something on it is in use: $mounted"
medium=$(findmnt --noheadings --output SOURCE /run/archiso/bootmnt || true)
[[ -z $medium ]] || ! lsblk --noheadings --raw --paths --output NAME "$disk" | grep -qxF "$medium" || refuse "it is the install medium"
"""
    )
    if parts[0].serial != seen.serial:
        guard += f'[[ $(readlink -f /dev/disk/by-id/{quote(parts[0].serial)}) == "$disk" ]] || refuse "it is not {parts[0].serial}"\n'
    make = ["sgdisk"]
    for number, part in enumerate(parts, 1):
        size_mib = part.size_mib or (swap_size_mib if part.kind == "swap" else 0)
        make.append(
            f"--new={number}:0:{f'+{size_mib}M' if size_mib else '0'} --typecode={number}:{part.type_guid}"
            f" --partition-guid={number}:{part.uuid} --change-name={number}:{quote(part.name)}"
        )
    script = f"""release "$disk"
for part in $(lsblk --noheadings --raw --paths --output NAME "$disk" | tail -n +2); do wipefs --all --force "$part"; done
wipefs --all --force "$disk"
sgdisk --zap-all "$disk" > /dev/null
{" ".join(make)} "$disk"
partprobe "$disk"
udevadm settle --timeout=30
for part in {" ".join(part.path for part in parts)}; do
  [[ -b $part ]] || {{ echo "$part did not appear"; exit 1; }}
  wipefs --all --force $part  # what an older layout left at the same place
done
"""
    return Script(
        f"partition {seen.path}",
        why=f"serial {seen.serial}, {seen.model or 'no model name'}, {gibibytes(seen.size_bytes)}: "
        f"{', '.join(describe_part(part, swap_size_mib) for part in parts)}; now on it: {describe_contents(seen)}",
        probe=f"for id in {' '.join(part.uuid for part in parts)}; do [[ -b /dev/disk/by-partuuid/$id ]] || exit; done; echo yes",
        script=guard + script,
    )


def make_filesystem(name: str, devices: tuple[str, ...], filesystem: str, mkfs: str) -> Step:
    """A file system where there is none. One that is there, of any kind, is never replaced: it may hold a home."""
    listed = " ".join(devices)
    # blkid knows the partition's own entry even where it holds nothing: no status tells, only what is printed.
    look = "kind=$(blkid --probe --match-tag TYPE --output value $device || true); echo ${kind:-blank}"
    kinds = f"for device in {listed}; do {look}; done | sort -u | xargs"
    return Script(
        f"format {name}",
        why=f"{filesystem} where nothing is",
        probe=kinds,
        expect=filesystem,
        script=f"kind=$({kinds})\n"
        f'[[ $kind == blank ]] || {{ echo "{listed} holds $kind, not {filesystem}; to lose it: wipefs --all {listed}"; exit 1; }}\n'
        f"{mkfs} {listed}\nudevadm settle --timeout=30",
    )


# --- for a person -------------------------------------------------------------------------------------------


def describe_part(part: Part, swap_size_mib: int) -> str:
    kind = {"esp": "EFI system partition"}.get(part.kind, part.kind)
    size_mib = part.size_mib or (swap_size_mib if part.kind == "swap" else 0)
    size = f"{size_mib} MiB" if size_mib < 8192 else f"{size_mib // 1024} GiB"
    return f"{kind} of {size}" if size_mib else f"{kind} in the rest"
