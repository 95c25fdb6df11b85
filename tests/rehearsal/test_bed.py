"""What a rehearsed machine can have, seen from the live system on it: that the tests of layouts rest on it."""

import pytest

from provision.rehearsal.bed import Bed
from provision.rehearsal.qemu import Disk
from provision.rehearsal.vm import says_ssh
from tests.rehearsal.hardware import forget

pytestmark = pytest.mark.rehearsal

DISKS = "lsblk --nodeps --noheadings --raw --output NAME,SERIAL,TRAN --exclude 7"  # 7: loop devices
# A volume that only this machine's TPM and a passphrase open; cryptsetup finds the token by itself.
TPM = """
set -euo pipefail
umask 077
echo -n words > /tmp/passphrase
cryptsetup luksFormat --batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /tmp/passphrase /dev/nvme0n1
systemd-cryptenroll --unlock-key-file=/tmp/passphrase --tpm2-device=auto --tpm2-pcrs=7 /dev/nvme0n1
cryptsetup open --token-only --token-type systemd-tpm2 /dev/nvme0n1 opened
test -b /dev/mapper/opened && echo opened
sync
"""


def test_disks_of_every_bus_and_a_tpm(bed: Bed) -> None:
    """The kernel's names follow the order of the bus, also when it is turned round and a disk is dead; the TPM stays."""
    vm = bed.machine(
        "hardware", (Disk("A"), Disk("B", 1, "nvme"), Disk("C", 1, "sata"), Disk("D", 1, "sata")), tpm=True
    )
    try:
        bed.boot_live(vm)
        assert disks(bed.ssh(vm, DISKS)) == {
            "vda": "MEDIUM",
            "vdb": "A",
            "nvme0n1": "B nvme",
            "sda": "C sata",
            "sdb": "D sata",
        }
        assert bed.ssh(vm, f"bash -c '{TPM}'").splitlines()[-1] == "opened"
        vm.kill()

        vm.start(first="medium", without=["A"], reversed_disks=True)
        vm.wait_for_console("archiso login:")
        vm.answer_at("127.0.0.2")
        vm.wait_for_ssh()
        assert not says_ssh("127.0.0.1", vm.ssh_port)
        assert disks(bed.ssh(vm, DISKS)) == {
            "vda": "MEDIUM",
            "nvme0n1": "B nvme",
            "sda": "D sata",
            "sdb": "C sata",
        }
        bed.ssh(vm, "cryptsetup open --token-only --token-type systemd-tpm2 /dev/nvme0n1 opened")
    finally:
        forget(vm)


def disks(text: str) -> dict[str, str]:
    """Name → serial and bus, of lsblk's lines; it has no word for the bus of virtio."""
    named = {}
    for line in text.splitlines():
        name, *words = line.split()
        named[name] = " ".join(words)
    return named
