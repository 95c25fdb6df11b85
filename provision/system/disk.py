"""The disk that the machine file names, and its mirror: found, described, partitioned, formatted, mounted."""

from collections.abc import Iterator

from provision.errors import ProvisionError
from provision.facts import Disk, Facts
from provision.machine import Machine
from provision.steps import BASE_COMPLETE, File, Script, Step
from provision.system.crypt import volumes
from provision.system.data import data_mounts
from provision.system.inventory import describe_disk, describe_disks, find_disk, gibibytes
from provision.system.layout import LOOK, MOUNT, SWAP_FILE, Layout, Part, layout, show_filesystem, target
from provision.system.wipe import demand_free, demand_no_copies, free, is_ours, partition

LEAST_BYTES = 4 * 2**30


def find_disks(machine: Machine, facts: Facts) -> tuple[Disk, ...]:
    """The disk to install on, and the mirror where there is one; ProvisionError unless they can be used."""
    disk = machine.disk
    demand_whole_mirror(machine, facts)
    demand_no_copies(machine, facts)
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
    if disk.swap == "file" and disk.root_gib and disk.root_gib * 1024 < swap_mib(machine, facts) + 8192:
        raise ProvisionError(
            f"A swap file of {swap_mib(machine, facts) // 1024} GiB leaves too little of a root of {disk.root_gib} GiB.",
            f"Set disk.swap_gib or disk.root_gib of the machine file, then: fab -H {machine.name} plan",
        )
    for seen in found:
        if seen.size_bytes < needed:
            raise ProvisionError(
                f"{seen.path} holds {gibibytes(seen.size_bytes)}, which is too small for what [disk] of the machine file asks for: "
                f"{gibibytes(needed)}."
            )
    return tuple(found)


def demand_whole_mirror(machine: Machine, facts: Facts) -> None:
    """Refuse an installed machine that runs without a disk of its mirror: /boot may be missing with it."""
    wanted = machine.disk.system_serials
    gone = [serial for serial in wanted if not any(disk.is_called(serial) for disk in facts.disks)]
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
    ids = layout(machine)
    found = zip(machine.disk.system_serials, find_disks(machine, facts), strict=True)
    return [(ids.on(serial), disk) for serial, disk in found]


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
    ids, laid_out = layout(machine), pairs(machine, facts)
    targets = [seen for _, seen in laid_out]
    for parts, seen in laid_out:
        demand_free(parts, seen, facts, targets)
        if is_ours(parts, seen):
            yield from free(ids, seen)
        yield partition(parts, seen, swap_mib(machine, facts))
    yield from volumes(machine, facts)
    for part in ids.of("esp"):
        name = f"ESP of {part.serial}" if machine.disk.mirror else "ESP"
        yield make_filesystem(
            name,
            (part.device,),
            "vfat",
            fat_id(part),
            f"mkfs.fat -F 32 -n ESP -i {fat_id(part).replace('-', '')}",
        )
    for part in ids.of("swap"):
        if machine.disk.encryption == "none":
            yield make_filesystem("swap", (part.device,), "swap", part.uuid, f"mkswap -q -U {part.uuid}")
    roots, ident = tuple(part.device for part in ids.of("root")), ids.root_filesystem
    yield make_filesystem("root", roots, machine.disk.filesystem, ident, make_root(machine, ids))
    for part in ids.of("home"):
        ident = ids.home_filesystem
        yield make_filesystem("home", (part.device,), "ext4", ident, f"mkfs.ext4 -q -L home -U {ident}")
    yield mount(ids)


def fat_id(part: Part) -> str:
    """The volume id that we give an ESP, as blkid prints it."""
    return f"{part.uuid[:4]}-{part.uuid[4:8]}".upper()


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


def make_filesystem(name: str, devices: tuple[str, ...], filesystem: str, ident: str, mkfs: str) -> Step:
    """A file system where there is none. One that is there, of any kind, is never replaced: it may hold a home.

    `ident` is the id that `mkfs` gives it: one of the right kind that an older layout left at the same place is told by it.
    """
    listed = " ".join(devices)
    looks = f"{LOOK}for device in {listed}; do look $device; done | sort -u"
    return Script(
        f"format {name}",
        why=f"{filesystem} where nothing is",
        probe=looks,
        expect=f"{filesystem} {ident}",
        script=f"""seen=$({looks})
if [[ $seen == "{filesystem} {ident}" ]]; then exit 0; fi  # planned while it could not be seen
[[ $seen == blank ]] || {{
  echo "expected nothing, or our {filesystem}, on {listed}; there is:"
  echo "$seen"
  echo "If that may be lost: wipefs --all {listed}"
  exit 1
}}
{mkfs} {listed}
{show_filesystem(listed)}""",
    )
