"""Machines whose disks are laid out otherwise: encrypted, mirrored, with data disks. Each really boots from them."""

import os
import shutil
import subprocess

import pytest
from rich.console import Console

from provision.pins import fingerprint_of, parse_key
from provision.rehearsal.bed import Bed
from provision.rehearsal.loop import Rehearsal, fab_command
from provision.rehearsal.qemu import Disk
from provision.rehearsal.vm import TPM_STATE
from tests.rehearsal.hardware import FOUR_DISKS, forget
from tests.rehearsal.until import provision_until

pytestmark = pytest.mark.rehearsal

PASSPHRASE = "a passphrase of several words"
ENCRYPTED = """
[disk]
filesystem = "btrfs"
swap = "file"
swap_gib = 1
encryption = "luks"
passphrase = "env:REHEARSAL_PASSPHRASE"
unlock = "tpm2"
"""
MIRROR = """
[disk]
filesystem = "btrfs"
mirror = "REHEARSAL1"
swap = "partition"
swap_gib = 1
data = ["ARCHIVE0 /archive", "BLANK0 /scratch"]
"""
FOUND = "Found again"


def installed(rehearsal: Rehearsal, script: str, user: str = "ml") -> str:
    """What a script prints on the installed system, as its user, by OpenSSH with the pin that fab made."""
    known = rehearsal.machines / "known_hosts"
    options = [
        f"UserKnownHostsFile={known}",
        f"HostKeyAlias={rehearsal.name}",
        "StrictHostKeyChecking=yes",
        "BatchMode=yes",
    ]
    argv = [
        "ssh",
        "-F",
        "none",
        "-i",
        str(rehearsal.bed.parts.keys.identity),
        "-p",
        str(rehearsal.vm.ssh_port),
    ]
    argv += [word for option in (*options, "LogLevel=ERROR") for word in ("-o", option)]
    done = subprocess.run(
        [*argv, f"{user}@{rehearsal.vm.ssh_address}", "sudo bash -euo pipefail"],
        input=script,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.rotating
def test_an_encrypted_machine_is_opened_by_its_tpm(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVMe, LUKS2, btrfs subvolumes, swap file; booted without anybody; and, by another TPM, with the passphrase."""
    monkeypatch.setenv("REHEARSAL_PASSPHRASE", PASSPHRASE)
    vm = bed.machine("encrypted", (Disk("REHEARSAL0", bus="nvme"),), tpm=True)
    rehearsal = Rehearsal(bed, vm, Console(quiet=True), ENCRYPTED)
    try:
        rehearsal.boot(cold=True)
        provision_until(rehearsal, FOUND)
        seen = installed(
            rehearsal,
            "lsblk --noheadings --raw --output NAME,TYPE,FSTYPE,MOUNTPOINTS /dev/nvme0n1; cat /proc/swaps",
        )
        assert "nvme0n1p2 part crypto_LUKS" in seen
        assert "root crypt btrfs" in seen
        assert "/swap/swapfile" in seen
        mounts = installed(rehearsal, "findmnt --noheadings --raw --output TARGET,SOURCE --types btrfs")
        for folder, subvolume in (
            ("/", "@"),
            ("/home", "@home"),
            ("/var/log", "@log"),
            ("/.snapshots", "@snapshots"),
        ):
            assert f"{folder} /dev/mapper/root[/{subvolume}]" in mounts
        logs = "journalctl --boot --no-pager; cat /var/log/pacman.log; cat /proc/*/cmdline | tr '\\0' ' '; ls -R /run/metal"
        assert PASSPHRASE not in installed(rehearsal, f"{{ {logs}; }} 2> /dev/null || true")
        assert all(
            PASSPHRASE not in path.read_text(errors="replace") for path in rehearsal.logs.rglob("*.log")
        )

        installed(rehearsal, "sync")
        vm.kill()
        shutil.rmtree(vm.folder / TPM_STATE)  # another TPM: the machine's key is nothing to it
        vm.start()
        vm.wait_for_console("passphrase")
        vm.console_send(f"{PASSPHRASE}\n")
        vm.wait_for_ssh()
        assert "root crypt btrfs" in installed(
            rehearsal, "lsblk --noheadings --raw --output NAME,TYPE,FSTYPE"
        )
    finally:
        forget(vm)


@pytest.mark.rotating
def test_a_mirrored_machine_boots_from_either_disk(bed: Bed) -> None:
    """Two disks that an LVM lay on, a data disk with a file, a blank one; then the first ESP is lost, and names swap."""
    vm = bed.machine("mirror", FOUR_DISKS)
    rehearsal = Rehearsal(bed, vm, Console(quiet=True), MIRROR)
    try:
        rehearsal.boot(cold=False)
        bed.ssh(vm, "bash -euc '" + OLD_INSTALLATION + "'")
        fingerprint = f"--fingerprint={fingerprint_of(parse_key(bed.parts.keys.host_line))}"
        refused = fab(rehearsal, "provision", "--wipe=REHEARSAL0", fingerprint)
        assert refused.returncode == 1
        assert "nothing was changed" in refused.stdout + refused.stderr
        assert "--wipe=REHEARSAL0,REHEARSAL1" in refused.stdout + refused.stderr

        provision_until(rehearsal, "done [0-9.]+ s mount /scratch", "--wipe=REHEARSAL0,REHEARSAL1")
        assert installed(
            rehearsal, "cat /archive/letter; stat --format %U /archive/letter /scratch"
        ).split() == ["kept", "root", "ml"]
        assert "/dev/vd" in installed(rehearsal, "cat /proc/swaps")
        usage = installed(rehearsal, "btrfs filesystem usage / | grep -E '^(Data|Metadata)'")
        assert usage.count("RAID1") == 2
        esps = "blkid --match-token PARTLABEL=ESP@rehearsal --output device"
        assert len(installed(rehearsal, esps).split()) == 2

        installed(rehearsal, LOSE_THE_FIRST_ESP)
        vm.kill()
        vm.start(without=("REHEARSAL0",), reversed_disks=True)
        vm.wait_for_ssh()
        alone = installed(
            rehearsal,
            "cat /proc/cmdline; lsblk --nodeps --noheadings --output SERIAL; cat /archive/letter; btrfs device stats /",
        )
        assert "degraded,subvol=/@" in alone
        assert "REHEARSAL0" not in alone
        assert "kept" in alone
        refused = fab(rehearsal, "plan")
        assert (
            "runs without a disk of its mirror: serial REHEARSAL0 is gone" in refused.stdout + refused.stderr
        )
    finally:
        forget(vm)


OLD_INSTALLATION = """
pvcreate -q /dev/vdb /dev/vdc
vgcreate -q old /dev/vdb /dev/vdc
lvcreate -q --yes --size 1G --name root old
mkfs.ext4 -q -L oldroot /dev/old/root
mkfs.ext4 -q -L archive /dev/vdd
mount /dev/vdd /srv
echo kept > /srv/letter
umount /srv
sync
"""


# After a change of /boot the second ESP has it within seconds; then the first loses its file system.
LOSE_THE_FIRST_ESP = """
cp /etc/hostname /boot/marker
second=$(readlink -f /dev/disk/by-id/virtio-REHEARSAL1-part1)
for try in {1..30}; do
  sleep 1
  mount "$second" /srv  # for writing, as the copying does: the two would exclude each other otherwise
  synced=$([[ -e /srv/marker ]] && echo yes || echo no)
  umount /srv
  [[ $synced == no ]] || break
done
[[ $synced == yes ]]
systemctl stop metal-sync-esp.path metal-sync-esp.service
bootctl set-oneshot degraded.conf
umount /boot
dd if=/dev/zero of="$(readlink -f /dev/disk/by-id/virtio-REHEARSAL0-part1)" bs=1M count=64 status=none
sync
"""


def fab(rehearsal: Rehearsal, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        fab_command(*words),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **rehearsal.environment},
        check=False,
    )
