"""An update that is given again, and fails then: what an earlier one did is neither forgotten nor made to boot.

On the disk image of tests/rehearsal/test_update.py, with its stand-ins.
"""

from pathlib import Path

import pytest
from pytest_mock import MockerFixture

from provision.errors import ProvisionError
from provision.machine import Machine
from provision.snapshot import BEFORE, UPDATING
from tests.provision.conftest import live
from tests.rehearsal.test_aur import lower, pytestmark
from tests.rehearsal.test_update import Booted, Box, Cut, box, btrfs, machine_with, rollback, update

__all__ = ["box", "btrfs", "live", "lower", "pytestmark"]

# Once: it puts the packages in, the ESP keeps the kernel that it has, and it says that it failed.
BREAKS_OFF = """
printf '%s\\n' '#!/bin/bash' '[[ ! -e /tmp/breaks-off ]] || exit 0' "$(tail -n +2 /usr/local/bin/mkinitcpio)" > /tmp/mkinitcpio
cat /tmp/mkinitcpio > /usr/local/bin/mkinitcpio
cat > /usr/local/bin/pacman <<'PACMAN'
#!/bin/bash
/usr/bin/pacman "$@" || exit
[[ $1 != -Syu || ! -e /tmp/breaks-off ]] || { mv /tmp/breaks-off /boot/vmlinuz-linux-lts; exit 1; }
PACMAN
chmod 755 /usr/local/bin/pacman
cp /boot/vmlinuz-linux-lts /tmp/breaks-off
"""


def mirror_goes(box: Box) -> None:
    """In the middle of its own update: the list has packages that are not there."""
    box.do("mkdir -p /tmp/aside; rm -f /var/cache/pacman/pkg/*; mv /tmp/repos/now/own/*.pkg.tar /tmp/aside")


def fails(box: Box, machine: Machine, said: str) -> None:
    with pytest.raises(ProvisionError, match=said):
        update(box, machine)


def test_half_an_update_is_not_what_boots_because_the_next_one_changed_nothing(
    box: Box, btrfs: Machine
) -> None:
    """The first breaks off with packages changed, and says that the system from before is what boots."""
    box.publish("2")
    box.do(BREAKS_OFF)
    fails(box, btrfs, "Packages were changed")
    box.publish("3")
    mirror_goes(box)
    fails(box, btrfs, "No package was changed")
    box.do(f"[[ -e {UPDATING} ]]")
    assert box.boot() == Booted(f"{BEFORE}.conf", "1", f"/@snapshots/{BEFORE}")
    rollback(box, btrfs)
    assert box.boot() == Booted("arch-linux-lts.conf", "1", "/@")


def test_an_update_that_is_not_proved_yet_keeps_its_way_back(
    box: Box, btrfs: Machine, mocker: MockerFixture
) -> None:
    """What follows from the packages fails; at the second try a mirror does."""
    box.publish("2")
    converge = mocker.patch("provision.update.converge", side_effect=ProvisionError("no wheels"))
    fails(box, btrfs, "no wheels")
    box.publish("3")
    mirror_goes(box)
    fails(box, btrfs, "No package was changed")
    box.do(f"[[ -e {UPDATING} ]]")
    assert box.boot() == Booted("arch-linux-lts.conf", "2", "/@"), "all of it is in"
    box.do("mv /tmp/aside/* /tmp/repos/now/own")
    converge.side_effect = lambda machine, facts, *_: facts
    update(box, btrfs)
    assert box.boot() == Booted("arch-linux-lts.conf", "3", "/@")
    rollback(box, btrfs)
    assert box.boot() == Booted("arch-linux-lts.conf", "1", "/@"), "before the first try"


def test_without_snapshots_the_modules_of_the_old_kernel_stay_until_there_is_a_new_one(
    box: Box, tmp_path: Path
) -> None:
    ext4 = machine_with(tmp_path / "own", "ext4")
    box.publish("2")
    box.do(BREAKS_OFF)
    fails(box, ext4, "Packages were changed")
    box.publish("3")
    mirror_goes(box)
    fails(box, ext4, "No package was changed")
    assert box.boot() == Booted("arch-linux-lts.conf", "1", "/@"), "the ESP has the old kernel"


def test_without_snapshots_a_rollback_that_is_cut_off_boots_and_goes_on(box: Box, tmp_path: Path) -> None:
    """pacman has put the modules of the archive's kernel in, and the ESP still has the one of the update."""
    ext4 = machine_with(tmp_path / "own", "ext4")
    day = box.do("date --utc --reference /var/lib/pacman/sync/own.db +%Y/%m/%d").strip()
    folder = f"/tmp/archive/repos/{day}/own/os"
    box.do(f"mkdir -p {folder}; cp -r /tmp/repos/now/own {folder}/x86_64")
    box.publish("2")
    update(box, ext4)
    box.do("touch /tmp/cut-in-hook")
    with pytest.raises(Cut):
        rollback(box, ext4)
    assert box.do("ls /usr/lib/modules").split() == ["1"]
    assert box.boot() == Booted("arch-linux-lts.conf", "2", "/@")
    box.do("printf '#!/bin/bash\\necho 2\\n' > /usr/local/bin/uname")
    rollback(box, ext4)
    assert box.do("ls /usr/lib/modules").split() == ["1"], "it would pass for a kernel that is installed"
    assert box.boot() == Booted("arch-linux-lts.conf", "1", "/@")
