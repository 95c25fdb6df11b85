"""From the first contact to the reboot and beyond, with nothing typed and nobody trusted blindly."""

import os
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from provision.machine import machines_folder
from provision.pins import load_pins
from provision.rehearsal.bed import NAME, Bed
from provision.rehearsal.loop import PROJECT, Rehearsal, fab_command
from provision.rehearsal.qemu import Disk
from provision.rehearsal.vm import wait_until
from tests.rehearsal.hardware import forget
from tests.rehearsal.until import fab_running
from tests.sshd import keygen

pytestmark = pytest.mark.rehearsal

PASSPHRASE = "opened from afar"
UNLOCKED_OVER_SSH = """
[disk]
root_gib = 8
swap = "partition"
swap_gib = 1
encryption = "luks"
passphrase = "env:REHEARSAL_PASSPHRASE"
unlock = "ssh"

[system]
kernels = ["linux-lts", "linux"]
"""
ELSEWHERE = "127.0.0.9"
WAIT_S = 2400

ON_THE_ISO = r"""
set -eu
echo "hostname $(cat /proc/sys/kernel/hostname)"
echo "keys $(ls /etc/ssh/ssh_host_*_key | xargs)"
echo "network $(find /etc/systemd/network /run/systemd/network /etc/netplan -name '*cloud-init*' 2> /dev/null | xargs)"
echo "root $(passwd --status root | cut -d' ' -f2)"
cloud-init status --wait > /dev/null
echo "status $(cloud-init status)"
"""


class Operator:
    """A person with a key of their own, which no medium knows, and what they type."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal = rehearsal
        self.vm = rehearsal.vm
        self.machines = rehearsal.machines
        for folder in (rehearsal.machines, rehearsal.logs):
            shutil.rmtree(folder, ignore_errors=True)
        rehearsal.bed.write_machine_files(self.vm, machines_folder(), rehearsal.wishes)
        self.identity = keygen(self.vm.folder / "operator")
        local = self.machines / f"{NAME}.local.toml"
        local.write_text(
            local.read_text().replace(str(rehearsal.bed.parts.keys.identity), str(self.identity))
        )

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.rehearsal.environment, "HOME": str(self.vm.folder)}

    def types(self, *argv: str) -> str:
        """A command that must succeed; its output."""
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def seed(self) -> None:
        fab = fab_command("seed", NAME, f"--out={self.vm.folder / 'seed.iso'}")
        at = fab.index("-H")  # it takes the name instead
        del fab[at : at + 2]
        assert str(PROJECT) in fab
        self.types(*fab)

    def ssh(self, alias: str, user: str, script: str) -> str:
        """By OpenSSH, which reads the same pins."""
        options = [
            f"UserKnownHostsFile={self.machines / 'known_hosts'}",
            f"HostKeyAlias={alias}",
            "StrictHostKeyChecking=yes",
            "BatchMode=yes",
            "LogLevel=ERROR",
        ]
        words = [word for option in options for word in ("-o", option)]
        where = ["-i", str(self.identity), "-p", str(self.vm.ssh_port), f"{user}@{self.vm.ssh_address}"]
        return self.types("ssh", "-F", "none", *words, *where, script)


@pytest.mark.rotating
def test_nothing_is_typed_and_it_is_found_by_its_key(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed; SATA, root, /home and swap encrypted, two kernels; its initramfs waits for us; another address; opened once more."""
    monkeypatch.setenv("REHEARSAL_PASSPHRASE", PASSPHRASE)
    vm = bed.machine("identity", (Disk("REHEARSAL0", 16, bus="sata"),))
    rehearsal = Rehearsal(bed, vm, Console(quiet=True), UNLOCKED_OVER_SSH)
    operator = Operator(rehearsal)
    try:
        operator.seed()
        pins = operator.machines / "known_hosts"
        assert list(load_pins(pins)) == [f"{NAME}.live"]
        bed.boot_live(vm, seed=vm.folder / "seed.iso")
        seen = operator.ssh(f"{NAME}.live", "root", ON_THE_ISO).splitlines()
        assert f"hostname {NAME}" in seen, "by which mDNS finds it"
        assert "keys /etc/ssh/ssh_host_ed25519_key" in seen, "those that the medium had are gone"
        assert "network " in seen, "the medium's own network, which answers to mDNS, stays"
        assert "root P" in seen, "the console's password is as it was"
        assert "status status: done" in seen

        with fab_running(rehearsal, "provision", "--sweep") as (fab, output):

            def wait_for(pattern: str) -> None:
                def said() -> bool:
                    return re.search(pattern, output.read_text()) is not None

                def check() -> None:
                    vm.check()
                    assert fab.poll() is None or said(), output.read_text()

                wait_until(said, check, WAIT_S, f"fab to say {pattern!r}")

            wait_for("Rebooting")
            vm.answer_at(ELSEWHERE)
            wait_for("Found again")
            assert f"Found again at {ELSEWHERE}, by the host key" in output.read_text()
        assert {NAME, f"{NAME}.live", f"{NAME}.unlock"} == set(load_pins(pins))
        assert f'address = "{ELSEWHERE}"' in (operator.machines / f"{NAME}.local.toml").read_text()
        seen = operator.ssh(
            NAME, "ml", "lsblk --noheadings --raw --output NAME,TYPE,FSTYPE,MOUNTPOINTS; sync"
        ).splitlines()
        assert {"root crypt ext4 /", "home crypt ext4 /home", "swap crypt swap [SWAP]"} <= set(seen)
        assert operator.ssh(NAME, "ml", "sudo ls /boot/loader/entries").split() == [
            "arch-linux-lts.conf",
            "arch-linux.conf",
        ]

        vm.kill()
        vm.start()
        vm.wait_for_ssh()
        opened = operator.types(*fab_command("unlock"))
        assert f"{NAME} was given the passphrase of its disk" in opened
        assert f"{NAME} runs its installed system at {ELSEWHERE}." in opened
        logs = [path for path in rehearsal.logs.rglob("*") if path.is_file()]
        assert logs
        assert all(PASSPHRASE not in path.read_text(errors="replace") for path in logs)
        assert PASSPHRASE.encode() not in vm.serial_log.read_bytes()
    finally:
        forget(vm)
