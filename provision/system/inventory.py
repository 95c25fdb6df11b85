"""Which disk is meant, and what is on it, for a person to read. Pure."""

import re

from provision.errors import ProvisionError
from provision.facts import Disk, Facts
from provision.machine import Machine

MADE_BY_US = re.compile(r"(?:ESP|root|home|swap|data)@(.+)")  # names of partitions (PARTLABEL)


def find_disk(machine: Machine, facts: Facts, wanted: str, setting: str) -> Disk:
    """The one disk with that serial, or with that name in /dev/disk/by-id."""
    matching = [disk for disk in facts.disks if disk.is_called(wanted)]
    if not matching:
        raise ProvisionError(
            f"No disk with serial {wanted!r}, which {setting} of machine '{machine.name}' names.\n"
            f"Disks of the machine:\n{describe_disks(facts)}",
            f"Put the right serial into the machine file, then: fab -H {machine.name} plan",
        )
    if len(matching) > 1:
        names = "\n".join(f"  {disk.path}: {', '.join(disk.names) or 'no names'}" for disk in matching)
        raise ProvisionError(
            f"Serial {wanted!r} belongs to {len(matching)} disks. Which one is meant cannot be told.\n{names}",
            f"Where they have names in /dev/disk/by-id that differ, put one into {setting}.",
        )
    disk = matching[0]
    if disk.is_medium:
        raise ProvisionError(
            f"{disk.path} (serial {wanted}) is the install medium itself.", "Name another disk."
        )
    if disk.read_only:
        raise ProvisionError(f"{disk.path} (serial {wanted}) is read-only.")
    return disk


def describe_contents(seen: Disk) -> str:
    if seen.is_blank:
        return "nothing"
    if not seen.partitions and not seen.filesystem:
        return "something that is not known"
    return ", ".join(
        [*([seen.filesystem] if seen.filesystem and not seen.partitions else [])]
        + [
            f"{part.path} {part.filesystem or 'unformatted'} {part.label or part.name}".strip()
            for part in seen.partitions
        ]
    )


def describe_disk(seen: Disk) -> str:
    """Its serial and size, and what is on it: partitions, file systems, labels, bytes in use, mount points."""
    lines = [
        f"{seen.path}  serial {seen.serial or '(none)'}  {gibibytes(seen.size_bytes)}  {seen.model}".rstrip()
    ]
    if seen.is_medium:
        lines[0] += "  (install medium)"
    if seen.filesystem and not seen.partitions:
        lines.append(f"  whole disk: {seen.filesystem}{describe_used(seen.used_bytes)}")
    if not seen.is_blank and not seen.partitions and not seen.filesystem:
        lines.append("  no partition and no file system that is known, but it is not empty")
    for part in seen.partitions:
        names = " ".join(filter(None, [part.filesystem or "unformatted", part.label, part.name]))
        lines.append(
            f"  {part.path}  {gibibytes(part.size_bytes)}  {names}{describe_used(part.used_bytes)}  {' '.join(part.mounted_at)}".rstrip()
        )
    if seen.stacked:
        lines.append(f"  in use by {', '.join(seen.stacked)}")
    owners = {found[1] for part in seen.partitions if (found := MADE_BY_US.fullmatch(part.name))}
    lines += [f"  an installation of ours, for machine '{owner}'" for owner in sorted(owners)]
    return "\n".join(lines)


def describe_used(used_bytes: int | None) -> str:
    return "" if used_bytes is None else f"  {gibibytes(used_bytes)} used"


def describe_disks(facts: Facts) -> str:
    return "\n".join(describe_disk(disk) for disk in facts.disks) or "  none"


def gibibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
