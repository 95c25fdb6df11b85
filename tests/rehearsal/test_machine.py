"""Machines in software. Minutes each where nothing but emulation is at hand; nothing here asserts on time."""

import hashlib
import json
import os
import subprocess

import pytest
from rich.console import Console

from provision.facts import PROBE, Disk, parse_facts
from provision.machine import Machine, load_machine
from provision.pins import fingerprint_of, parse_key
from provision.rehearsal.bed import NAME, Bed
from provision.rehearsal.loop import Rehearsal, fab_command
from provision.rehearsal.vm import Vm
from provision.system import system
from provision.system.disk import find_disks
from tests.rehearsal.conftest import Done
from tests.rehearsal.hardware import FOUR_DISKS, forget

pytestmark = pytest.mark.rehearsal

LIVE = r"""
set -euo pipefail
[[ -d /run/archiso ]] && grep -q archisobasedir=arch /proc/cmdline && echo "is live"
echo "hostname $(< /etc/hostname)"
echo "shell $(getent passwd root | cut -d: -f7)"
echo "medium $(lsblk -no PKNAME "$(findmnt -no SOURCE /run/archiso/bootmnt)")"
echo "disk $(lsblk -dno NAME,SERIAL | awk '$2 == "REHEARSAL0" { print $1 }')"
[[ -d /sys/firmware/efi/efivars ]] && echo uefi
for tool in sgdisk mkfs.ext4 mkfs.fat mkfs.btrfs mkfs.xfs cryptsetup mdadm lvm cloud-init pacstrap genfstab arch-chroot efibootmgr rsync curl tmux; do
  command -v "$tool" > /dev/null || echo "lacks $tool"
done
for tool in git uv gcc kexec dropbear; do
  ! command -v "$tool" > /dev/null || echo "has $tool"
done
echo "keyring $(systemctl is-active pacman-init.service)"
systemctl list-units --failed --plain --no-legend | awk '{ print "failed " $1 }'
"""

# The repository says no to what Arch does not have, and pacman to what the ISO's keyring does not vouch for.
REPOSITORY = r"""
set -uo pipefail
grep -qx 'SigLevel = Required DatabaseOptional' /etc/pacman.conf || echo "not Arch's SigLevel"
echo 'Server = SERVERS' > /etc/pacman.d/mirrorlist
pacman -Sy --noconfirm > /dev/null || echo "no repository"
for name in base linux linux-lts nvidia-open nvidia-open-lts nvidia-open-dkms uv rsync python gcc git base-devel; do
  pacman -Sp --print-format %n "$name" > /dev/null || echo "lacks $name"
done
for name in nvidia nvidia-lts-open python3 openssh-server linux-image-amd64 nvidia-dkms; do
  ! pacman -Sp --print-format %n "$name" 2> /dev/null || echo "has $name"
done
mkdir /tmp/downloads
download() { pacman -Sw --nodeps --nodeps --noconfirm --cachedir /tmp/downloads "$@" > /dev/null 2>&1; }
download dosfstools || echo "refused a package with a good signature"
pacman-key --delete "$(cut -d: -f1 /usr/share/pacman/keyrings/archlinux-trusted)" > /dev/null 2>&1
download less && echo "accepted a signature of a stranger"
true
"""


def script(bed: Bed, vm: Vm, text: str) -> list[str]:
    """Lines that a bash script prints in the live system."""
    done = subprocess.run(
        [*bed.ssh_command(vm.ssh_port), "bash"],
        input=text,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_live_system_is_like_the_iso(bed: Bed, vm: Vm) -> None:
    bed.boot_live(vm)
    assert script(bed, vm, LIVE) == [
        "is live",
        "hostname archiso",
        "shell /usr/bin/zsh",
        "medium vda",
        "disk vdb",
        "uefi",
        "keyring active",
    ]
    servers = bed.server.url("repository") + "/$repo/os/$arch"
    assert script(bed, vm, REPOSITORY.replace("SERVERS", servers)) == []


def test_a_disk_that_holds_something_is_guarded(bed: Bed) -> None:
    """Every way to point it at the wrong disk, or at one that is in use: one message, and not a byte is written."""
    vm = bed.machine("guarded", FOUR_DISKS)
    rehearsal = Rehearsal(bed, vm, Console(quiet=True))
    rehearsal.boot(cold=False)
    wishes = rehearsal.machines / "rehearsal.toml"
    asked = wishes.read_text()
    fingerprint = f"--fingerprint={fingerprint_of(parse_key(bed.parts.keys.host_line))}"
    script(
        bed,
        vm,
        "sgdisk --new=1:0:0 --change-name=1:pictures /dev/vdb\npartprobe /dev/vdb\nmkfs.ext4 -q -L photos /dev/vdb1\n",
    )
    tower = "root@tower"  # what an installation for another machine calls its root
    script(
        bed, vm, f"sgdisk --new=1:0:0 --typecode=1:8304 --change-name=1:{tower} /dev/vdc\npartprobe /dev/vdc"
    )
    script(bed, vm, "sync")

    def content() -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in vm.disk_paths()]

    before = content()

    def says(text: str, *words: str, status: int = 1) -> None:
        done = subprocess.run(
            fab_command(*words, fingerprint),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, **rehearsal.environment},
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert text in " ".join((done.stdout + done.stderr).split()), done.stdout + done.stderr

    says("This would be lost", "plan", status=0)
    says("The disk holds something that is not ours; nothing was changed.", "provision")
    says("ext4 photos pictures 0.2 GiB used", "provision")
    says(
        "--wipe=MEDIUM is not the disk of machine 'rehearsal', whose serial is REHEARSAL0",
        "provision",
        "--wipe=MEDIUM",
    )
    wishes.write_text(asked.replace('"REHEARSAL0"', '"MEDIUM"'))
    says("is the install medium itself", "provision", "--wipe=MEDIUM")
    wishes.write_text(asked.replace('"REHEARSAL0"', '"OTHER"'))
    says("No disk with serial 'OTHER'", "provision", "--wipe=OTHER")
    wishes.write_text(asked.replace('"REHEARSAL0"', '"REHEARSAL0"\nsize_gib = 9'))
    says("holds 8.0 GiB, and disk.size_gib of machine 'rehearsal' says 9", "provision", "--wipe=REHEARSAL0")
    wishes.write_text(asked.replace('"REHEARSAL0"', '"REHEARSAL1"'))
    says("an installation of ours, for machine 'tower'", "provision")
    wishes.write_text(asked)
    machine = load_machine(NAME, rehearsal.machines)
    planned, wipe = plan_the_wipe(bed, vm, machine)
    script(bed, vm, "mkdir /tmp/photos\nmount -o ro,noload /dev/vdb1 /tmp/photos")
    says("is in use: /tmp/photos", "provision", "--wipe=REHEARSAL0")
    assert "something on it is in use: /tmp/photos" in refusal(bed, vm, wipe)
    script(bed, vm, "umount /tmp/photos")
    swapped = wipe.replace(f"disk={planned.path}", "disk=/dev/vdc")  # the kernel's names, after another boot
    assert "its serial is 'REHEARSAL1'" in refusal(bed, vm, swapped)
    medium = wipe.replace(f"disk={planned.path}", "disk=/dev/vda").replace("== REHEARSAL0", "== MEDIUM")
    assert "refused to wipe /dev/vda" in refusal(bed, vm, medium)
    assert content() == before
    script(bed, vm, "e2label /dev/vdb1 holiday\nudevadm settle")
    assert "what it holds changed since it was planned" in refusal(bed, vm, wipe)
    forget(vm)


def plan_the_wipe(bed: Bed, vm: Vm, machine: Machine) -> tuple[Disk, str]:
    """The target as a probe saw it now, and the script that would wipe it."""
    facts = parse_facts("\n".join(script(bed, vm, PROBE)))
    step = next(step for step in system(machine, facts, facts.clock_s) if step.name.startswith("partition "))
    return find_disks(machine, facts)[0], f"set -euo pipefail\n{step.script}"


def refusal(bed: Bed, vm: Vm, wipe: str) -> str:
    return "\n".join(script(bed, vm, f"bash <<'WIPE' || true\n{wipe}\nWIPE"))


def test_whole_way_in_one_command(whole_way: Done) -> None:
    """`make rehearsal`: to a checkpoint on this computer, byte for byte what was trained there, that continues a prompt."""
    text = whole_way.text
    assert whole_way.status == 0, text[-6000:]
    assert "verified" in text
    assert "OTHELLO.\n" in text.replace("  ", "")
    for phase in ("programs", "bed", "boot", "provision", "train", "fetch", "sample", "total"):
        assert f"\n {phase} " in text, f"the table lacks {phase}:\n{text[-3000:]}"
    manifests = list((whole_way.folder / "checkpoints" / "rehearsal").rglob("manifest.json"))
    assert len(manifests) >= 2
    for manifest in manifests:
        for name, wanted in json.loads(manifest.read_text())["files"].items():
            assert hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() == wanted["sha256"]
