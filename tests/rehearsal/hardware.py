"""Machines that several tests use: the same hardware shares one saved state."""

from provision.rehearsal.qemu import Disk
from provision.rehearsal.vm import Vm

FOUR_DISKS = tuple(
    Disk(serial, size_gib)
    for serial, size_gib in (("REHEARSAL0", 8), ("REHEARSAL1", 8), ("ARCHIVE0", 1), ("BLANK0", 1))
)


def forget(vm: Vm) -> None:
    """Off, and its disks gone: they are gigabytes. The logs stay."""
    vm.kill()
    for disk in vm.disk_paths():
        disk.unlink(missing_ok=True)
