"""A machine on btrfs in software: drift, an update, its power cut in the middle, the way back. Each restart is a real boot."""

import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from provision.rehearsal.bed import NAME, Bed
from provision.rehearsal.loop import PROJECT, Rehearsal, fab_command
from provision.rehearsal.vm import wait_until
from tests.rehearsal.hardware import FOUR_DISKS, forget
from tests.rehearsal.test_layouts import installed
from tests.rehearsal.until import fab_running, provision_until

pytestmark = [pytest.mark.rehearsal, pytest.mark.rotating]

BTRFS = '[disk]\nfilesystem = "btrfs"\n'
DEADLINE_S = 3600
# A repository on the machine with one package that is newer. Its folder is not in /srv, which goes back with the system.
PUBLISH = r"""
grep -q '^.newer.$' /etc/pacman.conf || sed -i '0,/^.core.$/s//[newer]\nSigLevel = Never\nServer = file:\/\/\/home\/newer\n\n[core]/' /etc/pacman.conf
mkdir -p /home/newer /run/build/usr/share/newer
printf '%s\n' 'pkgname = tmux' 'pkgbase = tmux' 'pkgver = VERSION-1' 'pkgdesc = x' 'builddate = 1' 'size = 1' 'arch = any' > /run/build/.PKGINFO
bsdtar -C /run/build -cf /home/newer/tmux-VERSION-1-any.pkg.tar .PKGINFO usr
rm -f /home/newer/newer.db*
repo-add --quiet /home/newer/newer.db.tar.gz /home/newer/tmux-VERSION-1-any.pkg.tar
"""
SEEN = r"""
findmnt --noheadings --output FSROOT /
sed -n 's/^default //p' /boot/loader/loader.conf
pacman -Q tmux
"""


def fab(rehearsal: Rehearsal, *words: str, status: int = 0) -> str:
    done = subprocess.run(
        fab_command(*words),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **rehearsal.environment},
        timeout=DEADLINE_S,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == status, said[-4000:]
    return said


def test_an_update_its_power_cut_and_the_way_back(bed: Bed) -> None:
    vm = bed.machine("update", FOUR_DISKS[:1])
    rehearsal = Rehearsal(bed, vm, Console(quiet=True), BTRFS)
    try:
        rehearsal.boot(cold=False)
        provision_until(rehearsal, "Found again")
        fab(rehearsal, "provision")
        first = installed(rehearsal, SEEN).splitlines()
        assert first[:2] == ["/@", "arch-linux-lts.conf"]

        installed(rehearsal, PUBLISH.replace("VERSION", "98"))
        said = fab(rehearsal, "update", "--restart")
        assert re.search(r"tmux .* → 98-1", said), said
        assert installed(rehearsal, SEEN).splitlines() == ["/@", "arch-linux-lts.conf", "tmux 98-1"]
        assert "before-update" in installed(
            rehearsal, "ls /boot/loader/entries; systemctl is-enabled metal-settle-update || true"
        )
        assert "What `rollback` goes back to" in fab(rehearsal, "plan")

        fab(rehearsal, "rollback")
        assert installed(rehearsal, SEEN).splitlines() == first
        installed(rehearsal, "ls -d /.snapshots/rolled-back-*")

        installed(rehearsal, PUBLISH.replace("VERSION", "99") + SLOW)
        with fab_running(rehearsal, "update") as (running, _):
            wait_until(
                lambda: (
                    installed(rehearsal, "cat /run/slow 2> /dev/null || true").strip() == "at work"
                    or running.poll() is not None
                ),
                vm.check,
                DEADLINE_S,
                "the transaction",
            )
            assert running.poll() is None
            vm.kill()
        rehearsal.boot_again()
        assert installed(rehearsal, SEEN).splitlines()[:2] == [
            "/@snapshots/before-update",
            "before-update.conf",
        ]
        refused = fab(rehearsal, "update", status=1)
        assert f"fab -H {NAME} rollback" in refused
        fab(rehearsal, "rollback")
        assert installed(rehearsal, SEEN).splitlines() == first
        installed(rehearsal, "rm /etc/pacman.d/hooks/slow.hook")
        fab(rehearsal, "update")
        assert installed(rehearsal, SEEN).splitlines() == ["/@", "arch-linux-lts.conf", "tmux 99-1"]

        drift = [sys.executable, "-m", "tests.drift", NAME]
        environment = {**os.environ, **rehearsal.environment}
        done = subprocess.run(
            drift, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "50 shown" in done.stdout
    finally:
        forget(vm)


# The transaction stands still when its packages are in, and the power goes.
SLOW = r"""
mkdir -p /etc/pacman.d/hooks
cat > /etc/pacman.d/hooks/slow.hook <<'HOOK'
[Trigger]
Operation = Upgrade
Type = Package
Target = tmux
[Action]
When = PostTransaction
Exec = /usr/bin/bash -c 'sync; echo at work > /run/slow; sleep 600'
HOOK
"""
