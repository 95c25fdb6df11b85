"""A machine that waits for the passphrase of its disk: a real dropbear, a real LUKS volume, the real cryptsetup.

The volume is only tried and not opened: there is no device mapper in a container.
"""

import io
import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from provision.dial import Wanted
from provision.errors import Locked, ProvisionError, Refused, UnknownKey
from provision.find import opener_for, reconnect_after_reboot, unlock_machine
from provision.host import connect
from provision.machine import Machine
from provision.pins import parse_key, pin
from provision.secrets import Secret
from provision.unlock import Opener, give_passphrase
from tests.sshd import Sshd, keygen, wait_for
from tests.test_tasks import fab, refused

PASSPHRASE = "correct horse & $battery 'staple' ü"
MKFS = "cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file - /run/volume"

# What root's login is in the initramfs: see mkinitcpio-utils' cryptsetup_shell, whose behaviour this follows.
SHELL = """#!/bin/sh
echo "$@" >>/run/commands
echo asked >>/run/asked
if [ ! -e /run/mapper ]; then echo "encryption bootup not succeeded. please wait!"
elif cryptsetup open --test-passphrase --type luks /run/volume; then echo >/run/done
fi
"""


class Waiting:
    """The initramfs of an installed machine, in the namespaces of an `Sshd` and on its port."""

    def __init__(self, sshd: Sshd) -> None:
        self.sshd = sshd
        sshd.pin()
        sshd.stop_listening()
        sshd.set_boot_id("boot-2")
        shell = sshd.path("/run/bin/cryptsetup_shell")
        shell.write_text(SHELL)
        shell.chmod(0o755)
        sshd.path("/run/etc/shells").write_text("/run/bin/cryptsetup_shell\n")
        passwd = sshd.path("/run/etc/passwd")
        lines = passwd.read_text().splitlines()
        root = "root:x:0:0:root:/run/home/root:/run/bin/cryptsetup_shell"
        passwd.write_text("\n".join([root, *(line for line in lines if not line.startswith("root:"))]) + "\n")
        folder = sshd.path("/run/home/root/.ssh")
        folder.mkdir(mode=0o700)
        (folder / "authorized_keys").write_text(sshd.public_key + "\n")
        self.inside(
            "mount --bind /run/etc/shells /etc/shells; truncate -s 20M /run/volume; touch /run/mapper"
        )
        self.inside(MKFS, PASSPHRASE)
        self.public_key = self.inside(
            "dropbearkey -t ed25519 -f /run/unlock_key | grep '^ssh-ed25519 '"
        ).strip()
        pin(sshd.pins, "box.unlock", parse_key(self.public_key))
        self.start()

    def inside(self, script: str, stdin: str = "") -> str:
        done = subprocess.run(
            ["nsenter", "-t", str(self.sshd.init), "-m", "-p", "--", "bash", "-euc", script],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> None:
        self.inside(
            f"dropbear -s -j -k -E -r /run/unlock_key -P /run/dropbear.pid -p 127.0.0.1:{self.sshd.port} </dev/null >>/run/log 2>&1"
        )
        wait_for(lambda: self.sshd._listens() and self.sshd.path("/run/dropbear.pid").exists(), "dropbear")

    def boot_on(self) -> None:
        """What the initramfs does once the disk is open: dropbear ends, then the installed system comes up."""
        wait_for(self.sshd.path("/run/done").exists, "the passphrase", 60)
        time.sleep(0.5)
        self.stop()
        time.sleep(1)
        self.sshd.start()

    def stop(self) -> None:
        self.inside("kill $(cat /run/dropbear.pid); rm -f /run/dropbear.pid")
        wait_for(lambda: not self.sshd._listens(), "dropbear to end")

    def asked(self) -> int:
        path = self.sshd.path("/run/asked")
        return path.read_text().count("asked") if path.exists() else 0

    def machine(self, reference: str = "env:PASSPHRASE") -> Machine:
        machine = self.sshd.machine()
        disk = replace(machine.disk, encryption="luks", unlock="ssh", passphrase=Secret(reference))
        return replace(machine, disk=disk)

    def wanted(self, reference: str = "env:PASSPHRASE") -> Wanted:
        return Wanted(self.machine(reference), self.sshd.pins)


@pytest.fixture
def waiting(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> Waiting:
    for program in ("dropbear", "dropbearkey", "cryptsetup"):
        if not shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin"):
            pytest.skip(f"there is no {program}: install dropbear-bin and cryptsetup-bin")
    monkeypatch.setenv("PASSPHRASE", PASSPHRASE)
    return Waiting(sshd)


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_nobody_takes_it_for_the_installed_system(waiting: Waiting) -> None:
    with pytest.raises(Locked, match="waits for the passphrase of its disk") as caught:
        connect(waiting.machine(), waiting.sshd.pins)
    assert caught.value.hint == "fab -H box unlock"
    assert waiting.asked() == 0, "no login, before it is known who shall open it"


def test_it_is_opened_and_found_again(waiting: Waiting) -> None:
    boot = threading.Thread(target=waiting.boot_on)
    boot.start()
    waits: list[str] = []
    machine = waiting.machine()
    with reconnect_after_reboot(
        machine,
        waiting.sshd.pins,
        "boot-1",
        deadline_s=60,
        opener=opener_for(machine),
        on_wait=waits.append,
        poll_s=0.1,
    ) as host:
        assert (host.system, host.user, host.boot_id()) == ("installed", "ml", "boot-2")
    boot.join()
    assert waiting.asked() == 1, "not once more while it boots on"
    assert any("was given the passphrase" in wait for wait in waits)
    commands = waiting.sshd.path("/run/commands").read_text()
    assert "horse" not in commands + waiting.sshd.path("/run/log").read_text()


@pytest.mark.parametrize("passphrase", ["wrong", ""])
def test_a_wrong_passphrase_is_said_and_not_shown(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch, passphrase: str
) -> None:
    """cryptsetup_shell ends with status 0 all the same."""
    monkeypatch.setenv("PASSPHRASE", passphrase)
    with pytest.raises(ProvisionError) as caught:
        unlock_machine(waiting.machine(), waiting.sshd.pins, [], quiet())
    assert "env:PASSPHRASE" in caught.value.message
    if passphrase:
        assert isinstance(caught.value, Refused)
        assert "does not open its disk" in caught.value.message
        assert "wrong" not in str(caught.value)
        assert waiting.asked() == 1, "no second try with what is wrong"


def test_too_early_is_tried_again(waiting: Waiting) -> None:
    waiting.inside("rm /run/mapper")
    opener = Opener(lambda: PASSPHRASE)
    assert "not ready" in opener.open(waiting.wanted())
    waiting.inside("touch /run/mapper")
    assert "was given" in opener.open(waiting.wanted())
    assert "boots on" in opener.open(waiting.wanted())
    assert waiting.asked() == 2


def test_a_machine_that_goes_on_waiting_is_given_up(waiting: Waiting) -> None:
    opener = Opener(lambda: PASSPHRASE, again_s=0)
    for _ in range(3):
        assert "was given" in opener.open(waiting.wanted())
    with pytest.raises(ProvisionError, match="took its passphrase 3 times"):
        opener.open(waiting.wanted())
    assert PASSPHRASE not in repr(opener)


def test_somebody_else_is_told_nothing(waiting: Waiting) -> None:
    other = keygen(waiting.sshd.folder / "other").with_suffix(".pub").read_text()
    pin(waiting.sshd.pins, "box.unlock", parse_key(other))
    with pytest.raises(UnknownKey):
        give_passphrase(waiting.wanted(), PASSPHRASE)
    assert waiting.asked() == 0


def test_the_installed_system_is_not_given_a_passphrase(waiting: Waiting) -> None:
    waiting.stop()
    waiting.sshd.start()
    with pytest.raises(Refused, match="now in its installed system; expected the unlock one"):
        give_passphrase(waiting.wanted(), PASSPHRASE)


def test_without_a_passphrase_it_says_so(waiting: Waiting) -> None:
    with pytest.raises(Locked, match=r"disk\.passphrase says no passphrase"):
        unlock_machine(waiting.machine(""), waiting.sshd.pins, [], quiet())


def test_the_task_and_any_other_task_open_it(waiting: Waiting) -> None:
    """As typed: `fab unlock`; then another task, for which it waits anew."""
    folder = waiting.sshd.folder / "machines"
    machine = waiting.machine()
    assert machine.name == "box"
    with (folder / "box.toml").open("a") as file:
        file.write(
            f'identity = "{waiting.sshd.identity}"\n'
            '[disk]\nserial = "none"\nencryption = "luks"\nunlock = "ssh"\npassphrase = "env:PASSPHRASE"\n'
        )
    text = (folder / "box.toml").read_text().replace('[disk]\nserial = "none"\n[user]', "[user]")
    (folder / "box.toml").write_text(text)
    for task, says in (("unlock", "box runs its installed system"), ("disks", "/dev/")):
        boot = threading.Thread(target=waiting.boot_on)
        boot.start()
        done = fab(folder, "-H", "box", task)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "was given the passphrase of its disk" in done.stdout
        assert ("waits for the passphrase of its disk." in done.stdout) == (task != "unlock")
        assert "Its disk is open, and box runs." in done.stdout
        assert says in done.stdout
        assert "horse" not in done.stdout + done.stderr
        boot.join()
        waiting.sshd.path("/run/done").unlink()
        waiting.sshd.stop_listening()
        waiting.start()
    waiting.stop()
    threading.Timer(3, waiting.start).start()  # it is switched on while we are asking already
    boot = threading.Thread(target=waiting.boot_on)
    boot.start()
    done = fab(folder, "-H", "box", "unlock")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Connection refused" in done.stdout
    boot.join()
    waiting.sshd.stop_listening()
    waiting.start()
    (folder / "box.toml").write_text(text.replace("env:PASSPHRASE", "env:NOT_THERE"))
    assert "The secret at env:NOT_THERE is empty or not there." in refused(fab(folder, "-H", "box", "disks"))


def test_an_installed_machine_has_nothing_to_open(sshd: Sshd) -> None:
    sshd.pin()
    folder: Path = sshd.pins.parent
    sshd.machine()
    (folder / "box.local.toml").write_text(f'[ssh]\nidentity = "{sshd.identity}"\n')
    done = fab(folder, "-H", "box", "unlock")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "box runs its installed system at 127.0.0.1.\n"
