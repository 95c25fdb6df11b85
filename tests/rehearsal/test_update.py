"""Update and rollback on real btrfs: cut off after every command, the machine boots into what fits together.

A disk image with the subvolumes of an installation and an ESP (FAT where this kernel knows it), in namespaces of its own; pacman, btrfs and the Steps' bash
are real. Stand-ins: the kernels are lines of text, `boot` reads what systemd-boot would, mkinitcpio writes a line,
bootctl a file, and the restart is a new mount. What the disk's own cache loses with the power is not shown here.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import pytest
from pytest_mock import MockerFixture
from rich.console import Console

from provision.errors import ProvisionError
from provision.facts import Facts
from provision.host import Result
from provision.machine import Machine
from provision.snapshot import BEFORE, UPDATING
from provision.update import rollback_machine, update_machine
from tests.provision.conftest import live
from tests.provision.test_own import wish
from tests.rehearsal.hardware import today
from tests.rehearsal.test_aur import lower, pytestmark
from tests.sshd import wait_for

__all__ = ["live", "lower", "pytestmark"]

SETUP = r"""
set -eu
mount -t tmpfs -o mode=755 tmpfs "$scratch"
cd "$scratch"
mkdir upper work root sys top state images
mount -t overlay -o "lowerdir=$lower,upperdir=upper,workdir=work" overlay root
mount --bind /dev root/dev
mount -t proc proc root/proc
truncate --size 256M images/disk
truncate --size 40M images/esp
mkdir root/images root/top
mount --bind images root/images
chroot root mkfs.btrfs -q /images/disk
if grep -qw vfat /proc/filesystems; then chroot root mkfs.fat /images/esp > /dev/null; else chroot root mkfs.ext4 -q /images/esp; fi
mount -t btrfs -o loop images/disk top
mount --bind top root/top
for name in @ @snapshots; do chroot root btrfs subvolume create "/top/$name" > /dev/null; done
mkdir -p root/usr/local/bin root/srv
for name in systemctl mkinitcpio bootctl ip uname; do printf '%s' "${!name}" > "root/usr/local/bin/$name"; chmod 755 "root/usr/local/bin/$name"; done
cd top/@
mkdir -p dev proc run tmp root boot .snapshots modules srv/repo var/lib/pacman var/log var/lib/metal-to-model var/cache/pacman/pkg usr
for name in bin sbin lib lib64; do ln -s "usr/$name" "$name"; done
cp -a "$scratch/root/etc" etc
mount -o loop "$scratch/images/esp" boot
mkdir -p boot/loader/entries
printf 'default arch-linux-lts.conf\ntimeout 3\neditor no\n' > boot/loader/loader.conf
printf 'title Arch Linux (linux-lts)\nlinux /vmlinuz-linux-lts\ninitrd /initramfs-linux-lts.img\noptions root=UUID=1 rootflags=subvol=/@ rw quiet\n' \
  > boot/loader/entries/arch-linux-lts.conf
umount boot
touch "$scratch/ready"
while :; do sleep 1000 & wait $!; done
"""
# What the firmware and systemd-boot do, as far as it matters here: prints the entry, the kernel's version and the root.
BOOT = r"""
set -euo pipefail
cd "$scratch"
! mountpoint -q sys || umount --recursive sys
rm -rf esp; mkdir esp
mount -o loop images/esp esp
entry=$(sed -n 's/^default //p' esp/loader/loader.conf)
if [[ -e state/oneshot ]]; then entry=$(< state/oneshot); rm state/oneshot; fi
of() { sed -n "s/^$1 //p" "esp/loader/entries/$entry"; }
kernel=$(< "esp$(of linux)") initramfs=$(< "esp$(of initrd)") options=$(of options)
umount esp
flags=${options##*rootflags=} flags=${flags%% *}
mount -t btrfs -o "loop,$flags" images/disk sys
mount -o remount,rw,noatime,compress=zstd:1,subvol=/@ sys  # as of fstab, of whatever subvolume it is
mount -t btrfs -o loop,subvol=/@snapshots images/disk sys/.snapshots
mount --bind root/usr sys/usr
mount --bind sys/modules sys/usr/lib/modules
mount --bind /dev sys/dev
mount -t proc proc sys/proc
mount -t tmpfs tmpfs sys/run
mount --bind state sys/tmp
mount -o loop images/esp sys/boot
keep=sys/etc/systemd/system/metal-keep-modules.service
if [[ -e $keep && -d sys/var/lib/metal-to-model/modules/$kernel && ! -d sys/modules/$kernel/kernel ]]; then
  chroot sys bash -c "$(sed -n "s/%v/$kernel/g; s/^ExecStart=//p" "$keep")"
fi
[[ -d sys/modules/$kernel/kernel && $initramfs == "$kernel" ]] || { echo "kernel $kernel, initramfs $initramfs, modules $(ls sys/modules)"; exit 1; }
echo "$entry $kernel $(findmnt --noheadings --output FSROOT --mountpoint "$scratch/sys")"
"""
SYSTEMCTL = """#!/bin/bash
case $* in *is-active*) exit 0 ;; *) echo "$*" >> /run/systemctl ;; esac
"""
MKINITCPIO = """#!/bin/bash
[[ ! -e /tmp/cut-in-hook ]] || { rm /tmp/cut-in-hook; kill -KILL 0; }
for base in /usr/lib/modules/*/pkgbase; do
  version=${base%/*}
  cp "${base%/*}/vmlinuz" "/boot/vmlinuz-$(< "$base")"
  echo "${version##*/}" > "/boot/initramfs-$(< "$base").img"
done
"""
UNAME = "#!/bin/bash\nls -t /usr/lib/modules | tail -n 1\n"
BOOTCTL = """#!/bin/bash
[[ ! -e /tmp/no-variables ]] || { echo 'Failed to access EFI variables' >&2; exit 1; }
[[ $1 == set-oneshot ]] && echo "$2" > /tmp/oneshot
"""
IP = "#!/bin/bash\necho default via 10.0.0.1\n"
PUBLISH = r"""
cat > /etc/pacman.conf <<'CONF'
[options]
Architecture = auto
SigLevel = Never
[own]
Include = /etc/pacman.d/mirrorlist
CONF
echo 'Server = file:///tmp/repos/DAY/own' > /etc/pacman.d/mirrorlist
mkdir -p /etc/pacman.d/hooks /tmp/repos/DAY/own
cat > /etc/pacman.d/hooks/90-kernel.hook <<'HOOK'
[Trigger]
Operation = Install
Operation = Upgrade
Type = Path
Target = usr/lib/modules/*/vmlinuz
[Action]
When = PostTransaction
Exec = /usr/local/bin/mkinitcpio --allpresets
HOOK
for name in linux-lts other; do
  folder=/run/build-$name-VERSION
  mkdir -p "$folder/usr/lib/modules/VERSION/kernel"
  if [[ $name == linux-lts ]]; then
    echo VERSION > "$folder/usr/lib/modules/VERSION/vmlinuz"; echo linux-lts > "$folder/usr/lib/modules/VERSION/pkgbase"
  fi
  printf '%s\n' "pkgname = $name" "pkgbase = $name" 'pkgver = VERSION-1' 'pkgdesc = x' 'builddate = 1' 'size = 1' 'arch = any' > "$folder/.PKGINFO"
  bsdtar -C "$folder" -cf "/tmp/repos/DAY/own/$name-VERSION-1-any.pkg.tar" .PKGINFO usr
done
rm -f /tmp/repos/DAY/own/own.db*
repo-add --quiet /tmp/repos/DAY/own/own.db.tar.gz /tmp/repos/DAY/own/*-VERSION-1-any.pkg.tar > /dev/null 2>&1
touch --date "+VERSION hours" /tmp/repos/DAY/own/own.db.tar.gz  # pacman takes one of the same second for the one it has
"""
# Before the command of that number, in whatever shell of the script, all of it is dead.
CUT = r"""
echo 0 > /run/commands
# Both ends of a pipe may be at it at once: then one of them finds nothing to read.
count() { local n; read -r n < /run/commands || return 0; echo $((n + 1)) > /run/commands; ((n + 1 != CUT)) || kill -KILL 0; }
set -T
trap count DEBUG
"""


@dataclass
class Booted:
    entry: str
    kernel: str
    root: str


class Cut(Exception):
    """The power was cut in the middle of a script."""


class Box:
    """A machine with a disk. It has of a Host what update and rollback use."""

    system, address = "installed", "box"

    def __init__(self, lower: Path, folder: Path) -> None:
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        values = {"scratch": self.scratch, "lower": lower, "systemctl": SYSTEMCTL, "mkinitcpio": MKINITCPIO, "bootctl": BOOTCTL, "ip": IP, "uname": UNAME}  # fmt: skip
        assigned = "".join(f"{name}={quote(str(value))}\n" for name, value in values.items())
        alone = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
        self.holder = subprocess.Popen([*alone, "bash", "-c", assigned + SETUP], stdin=subprocess.DEVNULL)
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        wait_for(lambda: bool(children.read_text().split()), "the namespaces")
        self.init = int(children.read_text().split()[0])
        wait_for(self.is_ready, "the disk")
        self.cut_at = (
            0  # the number of the command, over all scripts, before which the power goes; 0 = it does not
        )
        self.said: list[str] = []

    def is_ready(self) -> bool:
        assert self.holder.poll() is None, "the disk was not made"
        return Path(f"/proc/{self.init}/root{self.scratch}/ready").exists()

    def enter(self, argv: Sequence[str], script: str) -> subprocess.CompletedProcess[str]:
        words = ["nsenter", "-t", str(self.init), "-m", "-p", *argv]
        return subprocess.run(words, input=script, capture_output=True, text=True, start_new_session=True)

    def inside(self, script: str) -> subprocess.CompletedProcess[str]:
        clean = ["env", "-i", "PATH=/usr/local/bin:/usr/bin", "HOME=/root", "LC_ALL=C.UTF-8"]
        return self.enter(["chroot", f"{self.scratch}/sys", *clean, "bash", "--norc", "-euo", "pipefail", "-s"], script)  # fmt: skip

    def boot(self) -> Booted:
        """What boots now. It fails where the root lacks the kernel's modules."""
        done = self.enter(["bash"], f"scratch={self.scratch}\n{BOOT}")
        assert done.returncode == 0, done.stdout + done.stderr
        return Booted(*done.stdout.split())

    def publish(self, version: str, day: str = "now") -> None:
        done = self.inside(PUBLISH.replace("VERSION", version).replace("DAY", day))
        assert done.returncode == 0, done.stdout + done.stderr

    def do(self, script: str) -> str:
        done = self.inside(script)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # Of a Host

    def look(self, script: str, *, deadline_s: float = 0) -> Result:
        done = self.inside(script)
        assert done.returncode == 0, done.stdout + done.stderr
        return Result(0, done.stdout, done.stderr)

    def run(self, script: str, *, deadline_s: float = 0) -> Result:
        return self.look(script)

    def run_unit(self, unit: str, script: str, *, on_line: Callable[[str], None], deadline_s: float) -> int:
        if self.cut_at:
            script = CUT.replace("CUT)", f"{self.cut_at})") + script
        done = self.inside(script)
        if self.cut_at and done.returncode != -signal.SIGKILL:
            self.cut_at = max(0, self.cut_at - int(self.do("cat /run/commands")))
        for line in done.stdout.splitlines():
            on_line(line)
        self.said = done.stdout.splitlines()
        if done.returncode == -signal.SIGKILL:
            raise Cut
        return done.returncode

    def close(self) -> None:
        os.kill(self.init, signal.SIGKILL)
        self.holder.wait(10)


@pytest.fixture
def box(
    lower: Path, tmp_path: Path, mocker: MockerFixture, monkeypatch: pytest.MonkeyPatch, live: Facts
) -> Iterator[Box]:
    """Version 1 is installed. The flow around the Steps is the real one, but for the probes of real hardware."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    box = Box(lower, tmp_path)

    def facts(host: Box) -> Facts:
        root = box.do("findmnt --noheadings --output FSROOT /").strip()
        return replace(live, system="installed", owner="gpu1", subvolume=root)

    def restart(*_: object, **__: object) -> Box:
        box.boot()
        if box.do(
            f"[[ ! -e {UPDATING} || ! -e /etc/systemd/system/metal-settle-update.service ]] || cat /var/lib/metal-to-model/settle"
        ):
            box.do("bash -euo pipefail /var/lib/metal-to-model/settle")  # as systemd would
        return box

    mocker.patch("provision.update.gather_facts", side_effect=facts)
    mocker.patch("provision.update.reboot_and_find", side_effect=restart)
    mocker.patch("provision.update.wanted_packages", return_value=("linux-lts", "other"))
    mocker.patch("provision.update.converge", side_effect=lambda machine, facts, *_: facts)
    mocker.patch("provision.update.prove")
    mocker.patch("provision.update.look_for_extras")
    mocker.patch("provision.update.render_extras", return_value="")
    try:
        first = f"{box.scratch}/top/@"
        packages = PUBLISH.replace("VERSION", "1").replace("DAY", "now")
        mounts = f"cd {first}; mount --bind {box.scratch}/root/usr usr; mount --bind modules usr/lib/modules; mount --bind /dev dev; mount -t proc proc proc; mount -t tmpfs tmpfs run; mount --bind {box.scratch}/state tmp; mount -o loop {box.scratch}/images/esp boot"
        install = f"{packages}\npacman -Sy --noconfirm linux-lts other > /dev/null"
        done = box.enter(
            ["bash"],
            f"set -e\n{mounts}\nchroot . env -i PATH=/usr/local/bin:/usr/bin bash -euc {quote(install)}\numount boot tmp run proc dev usr/lib/modules usr",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert box.boot() == Booted("arch-linux-lts.conf", "1", "/@")
        yield box
    finally:
        box.close()


def machine_with(folder: Path, filesystem: str) -> Machine:
    machine = wish(folder, '[mirror]\narchive = "file:///tmp/archive"\n')
    return replace(machine, disk=replace(machine.disk, filesystem=filesystem))


@pytest.fixture
def btrfs(tmp_path: Path) -> Machine:
    return machine_with(tmp_path / "own", "btrfs")


def update(box: Box, machine: Machine, *, restart: bool = True) -> None:
    update_machine(machine, box, Path("pins"), Console(quiet=True), restart=restart)  # type: ignore[arg-type]


def rollback(box: Box, machine: Machine) -> None:
    rollback_machine(machine, box, Path("pins"), Console(quiet=True))  # type: ignore[arg-type]


def as_told(box: Box, machine: Machine, task: Callable[[Box, Machine], None]) -> None:
    """The same command again, and what it says to type where it says no."""
    for _ in range(4):
        try:
            return task(box, machine)
        except ProvisionError as error:
            if "rollback" not in error.hint:
                raise
            rollback(box, machine)
    raise AssertionError("it never came to an end")


def cut_at(box: Box, machine: Machine, number: int, task: Callable[[Box, Machine], None]) -> bool:
    """Cut before that command of the task; False where it has no so many. Then it boots, and is gone on with."""
    box.cut_at = number
    try:
        task(box, machine)
    except Cut:
        box.cut_at = 0
        box.boot()
        return True
    assert box.cut_at, "there was no cut"
    box.cut_at = 0
    return False


def cuts(box: Box, machine: Machine, numbers: Sequence[int]) -> int:
    """Cut an update, and then the rollback of one, before each of these commands; how many there were."""
    version, made = 1, 0
    for number in numbers:
        version += 1
        box.publish(str(version))
        cut = cut_at(box, machine, number, update)
        as_told(box, machine, update)
        assert box.boot() == Booted("arch-linux-lts.conf", str(version), "/@"), number
        kept = box.do(f"cat /boot/{BEFORE}/vmlinuz-linux-lts").strip()
        back = cut_at(box, machine, number, rollback)
        if back and box.do("ls /boot/loader/entries").split() == ["arch-linux-lts.conf"]:
            assert box.boot().kernel == kept  # it was through
        elif back:
            rollback(box, machine)
        assert box.boot() == Booted("arch-linux-lts.conf", kept, "/@"), number
        made += cut + back
        if not (cut or back):
            break
    return made


def test_wherever_the_power_goes_it_boots_and_goes_on(box: Box, btrfs: Machine) -> None:
    """Before another command each day; METAL_ALL=1: before every one of the update's and the rollback's, half an hour."""
    every = range(1, 1000)
    assert cuts(box, btrfs, every if "METAL_ALL" in os.environ else [every[today() * 7 % 90]]) >= 2


def test_the_power_goes_between_the_modules_and_their_kernel(box: Box, btrfs: Machine) -> None:
    """As on every Arch: pacman has put the new modules in, and the ESP still has the old kernel."""
    box.publish("2")
    box.do("touch /tmp/cut-in-hook")
    with pytest.raises(Cut):
        update(box, btrfs)
    assert box.boot() == Booted(f"{BEFORE}.conf", "1", f"/@snapshots/{BEFORE}")
    with pytest.raises(ProvisionError, match="runs the snapshot") as caught:
        update(box, btrfs)
    assert "rollback" in caught.value.hint
    rollback(box, btrfs)
    assert box.boot() == Booted("arch-linux-lts.conf", "1", "/@")
    update(box, btrfs)
    assert box.boot() == Booted("arch-linux-lts.conf", "2", "/@")


def test_an_update_that_does_not_come_up_is_followed_by_the_old_system(
    box: Box, btrfs: Machine, mocker: MockerFixture
) -> None:
    """It hangs at its first boot, a person switches it off and on: no entry needs to be chosen."""
    box.publish("2")

    def hang(*_: object, **__: object) -> Box:
        assert box.boot() == Booted("arch-linux-lts.conf", "2", "/@")
        assert box.boot() == Booted(f"{BEFORE}.conf", "1", f"/@snapshots/{BEFORE}")
        return box

    mocker.patch("provision.update.reboot_and_find", side_effect=hang)
    with pytest.raises(ProvisionError, match="did not come up") as caught:
        update(box, btrfs)
    assert "fab -H gpu1 rollback" in caught.value.hint
    rollback(box, btrfs)
    assert box.boot() == Booted("arch-linux-lts.conf", "1", "/@")


def test_what_is_in_the_way_is_said_and_changes_nothing(box: Box, btrfs: Machine) -> None:
    """A full ESP, a mirror that is away; and a firmware without variables, with which the update is what boots."""
    box.do("dd if=/dev/zero of=/boot/film bs=1M status=none 2> /dev/null || true")
    box.publish("2")
    with pytest.raises(ProvisionError, match="a second set of kernels needs"):
        update(box, btrfs)
    box.do("rm /boot/film; mv /tmp/repos /tmp/away; touch /tmp/no-variables")
    lists = box.do("sha256sum /var/lib/pacman/sync/*")
    with pytest.raises(ProvisionError, match="failed retrieving file") as caught:
        update(box, btrfs)
    assert "fab -H gpu1 update" in caught.value.hint
    assert lists == box.do("sha256sum /var/lib/pacman/sync/*"), (
        "a list without its packages is half an upgrade"
    )
    assert box.boot() == Booted("arch-linux-lts.conf", "1", "/@")
    box.do("mv /tmp/away /tmp/repos")
    box.publish("2")
    box.do(
        "mkdir /tmp/aside; mv /tmp/repos/now/own/*-2-1-any.pkg.tar /tmp/aside"
    )  # a mirror in the middle of its own update
    with pytest.raises(ProvisionError, match="No package was changed"):
        update(box, btrfs)
    box.do(f"[[ ! -e {UPDATING} ]]")  # the next one begins anew
    assert box.boot() == Booted("arch-linux-lts.conf", "1", "/@")
    box.do("mv /tmp/aside/* /tmp/repos/now/own")
    update(box, btrfs)
    assert box.boot() == Booted("arch-linux-lts.conf", "2", "/@")


def test_what_a_person_keeps_in_the_system_that_is_taken_back_stays(box: Box, btrfs: Machine) -> None:
    """Data beside the packages, and subvolumes, which no snapshot holds."""
    box.publish("2")
    update(box, btrfs)
    box.do(
        "btrfs subvolume create /var/lib/machines; btrfs subvolume create /var/lib/boxes; echo b > /var/lib/boxes/a; echo s > /srv/a"
    )
    rollback(box, btrfs)
    assert re.search(
        r"in no snapshot, stays in /\.snapshots/rolled-back-\S+/var/lib/boxes", "\n".join(box.said)
    )
    update(box, btrfs)
    assert box.do("cat /.snapshots/rolled-back-*/{srv,var/lib/boxes}/a") == "s\nb\n"
    box.do(f"btrfs subvolume create /.snapshots/{BEFORE}/mine; touch /.snapshots/{BEFORE}/mine/a")
    box.publish("3")
    with pytest.raises(ProvisionError, match="mine is a subvolume that holds something"):
        update(box, btrfs)
    box.do(f"[[ -e /boot/loader/entries/{BEFORE}.conf ]]")
    box.do(
        f"btrfs subvolume delete /.snapshots/{BEFORE}/mine; btrfs subvolume create /.snapshots/{BEFORE}/empty"
    )
    update(box, btrfs)
    assert box.boot() == Booted("arch-linux-lts.conf", "3", "/@")


def test_without_snapshots_the_old_kernel_gets_its_modules_back(box: Box, tmp_path: Path) -> None:
    """The power goes when pacman has replaced them, and the ESP still has the old kernel."""
    ext4 = machine_with(tmp_path / "own", "ext4")
    box.publish("2")
    box.do("touch /tmp/cut-in-hook")
    with pytest.raises(Cut):
        update(box, ext4)
    assert box.do("ls /usr/lib/modules").split() == ["2"]
    assert box.boot() == Booted("arch-linux-lts.conf", "1", "/@")
    assert sorted(box.do("ls /usr/lib/modules").split()) == ["1", "2"]
    update(box, ext4)
    assert box.do("ls /usr/lib/modules").split() == ["2"], "it would pass for a kernel that is installed"
    assert box.boot() == Booted("arch-linux-lts.conf", "2", "/@")
    assert (
        box.do("ls /var/lib/metal-to-model; ls /etc/systemd/system")
        .split()
        .count("metal-keep-modules.service")
        == 0
    )


def test_without_snapshots_the_archive_has_the_packages_of_that_day(box: Box, tmp_path: Path) -> None:
    """Of the archive there is here one day of a repository, by its real addresses but for the server."""
    ext4 = machine_with(tmp_path / "own", "ext4")
    day = box.do("date --utc --reference /var/lib/pacman/sync/own.db +%Y/%m/%d").strip()
    box.do(
        f"mkdir -p /tmp/archive/repos/{day}/own/os; cp -r /tmp/repos/now/own /tmp/archive/repos/{day}/own/os/x86_64"
    )
    box.publish("2")
    update(box, ext4)
    assert box.boot() == Booted("arch-linux-lts.conf", "2", "/@")
    rollback(box, ext4)
    assert box.boot() == Booted("arch-linux-lts.conf", "1", "/@")
    assert box.do("pacman -Q; cat /etc/pacman.d/mirrorlist").splitlines() == [
        "linux-lts 1-1", "other 1-1", "Server = file:///tmp/repos/now/own",
    ]  # fmt: skip
    with pytest.raises(ProvisionError, match="nothing to go back to"):
        rollback(box, ext4)


def test_an_update_and_back(box: Box, btrfs: Machine) -> None:
    box.publish("2")
    box.do("echo old > /etc/setting")
    update(box, btrfs)
    assert box.boot() == Booted("arch-linux-lts.conf", "2", "/@")
    assert (
        box.do(f"pacman -Q; cat /boot/{BEFORE}/vmlinuz-linux-lts; ls {UPDATING} 2> /dev/null || true")
        == "linux-lts 2-1\nother 2-1\n1\n"
    )
    box.do("echo new > /etc/setting")
    update(box, btrfs)  # to which nothing is newer: what can be gone back to stays
    box.do(
        "cd /boot/loader; mv entries/arch-linux-lts.conf entries/arch-linux.conf; sed -i s/arch-linux-lts/arch-linux/ loader.conf"
    )
    rollback(box, btrfs)
    assert box.boot() == Booted("arch-linux-lts.conf", "1", "/@")
    assert box.do("pacman -Q; cat /etc/setting /.snapshots/rolled-back-*/etc/setting; ls /boot/loader/entries; cat /boot/loader/loader.conf").splitlines() == [
        "linux-lts 1-1", "other 1-1", "old", "new", "arch-linux-lts.conf", "arch-linux.conf", "default arch-linux-lts.conf", "timeout 3", "editor no",
    ]  # fmt: skip
    with pytest.raises(ProvisionError, match="nothing to go back to"):
        rollback(box, btrfs)
    update(box, btrfs)  # once more, over what the rollback left
    assert box.boot() == Booted("arch-linux-lts.conf", "2", "/@")
