"""Machines that several tests use: the same hardware shares one saved state. And which day it is, for those that rotate."""

import os
from datetime import date

from provision.rehearsal.qemu import Disk
from provision.rehearsal.vm import Vm

FOUR_DISKS = tuple(
    Disk(serial, size_gib)
    for serial, size_gib in (("REHEARSAL0", 8), ("REHEARSAL1", 8), ("ARCHIVE0", 1), ("BLANK0", 1))
)


def today() -> int:
    """A number that is another one each day, or that of METAL_DAY."""
    return int(os.environ.get("METAL_DAY", date.today().toordinal()))


def forget(vm: Vm) -> None:
    """Off, and its disks gone: they are gigabytes. The logs stay."""
    vm.kill()
    for disk in vm.disk_paths():
        disk.unlink(missing_ok=True)
