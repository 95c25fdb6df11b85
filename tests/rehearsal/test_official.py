"""`fab rehearse NAME --iso FILE` in a machine: signature, firmware, CD-ROM, seed, provision, the disk again.

Stand-ins, for Arch's own could not be here: the ISO is made of what the stand-in medium boots, laid out as archiso's
mkarchiso lays Arch's out; the key that signs it is made here; the machine file names the rehearsal's repository as its
mirror. A real Arch ISO and real mirrors were never met.
"""

import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from provision.machine import load_machine
from provision.pins import load_pins
from provision.rehearsal import loop
from provision.rehearsal.bed import Bed, load_example
from provision.rehearsal.iso import check_iso
from provision.rehearsal.loop import Rehearsal, fab_command
from provision.rehearsal.official import OfficialBed
from tests.rehearsal.images import Signers, make_bootable
from tests.sshd import keygen

pytestmark = pytest.mark.rehearsal

BOX1 = """
[ssh]
identity = "{identity}"
[user]
name = "ada"
authorized_keys = ["{identity}.pub"]
[disk]
serial = "S6XYNX0T123456"
size_gib = 931
[mirror]
servers = ["{repository}/$repo/os/$arch"]
[python]
interpreter = "/usr/bin/python3"
torch = "{torch}"
torch_index = "{torch_index}"
offline = true
find_links = "{wheels}/"
"""
LIVE = """\
set -eu
cloud-init status --wait > /dev/null
cloud-init status
cat /proc/cmdline
findmnt --noheadings --output SOURCE,FSTYPE /run/archiso/bootmnt
lsblk --noheadings --bytes --nodeps --output NAME,TYPE,SIZE,SERIAL
cat /root/.ssh/authorized_keys
"""


def typed(rehearsal: Rehearsal, command: str) -> str:
    """What a command prints, typed into `python -m provision.rehearsal ssh`."""
    cache = rehearsal.bed.folder
    argv = [
        sys.executable,
        "-m",
        "provision.rehearsal",
        "ssh",
        "--machine",
        "box1",
        "--iso",
        "--cache",
        str(cache),
    ]
    done = subprocess.run(
        [*argv, "--", f"bash -c '{command}'"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def look_at_live(rehearsal: Rehearsal) -> None:
    assert list(load_pins(rehearsal.machines / "known_hosts")) == ["box1.live"], "before anybody dialled"
    seen = typed(rehearsal, LIVE)
    assert "status: done" in seen
    assert "console=" not in seen, "the ISO names no serial console"
    assert "/dev/sr0 iso9660" in " ".join(seen.split())
    assert f"vda disk {931 << 30} S6XYNX0T123456" in " ".join(seen.split())
    assert Path(f"{load_machine('box1', rehearsal.machines).ssh.identity}.pub").read_text().split()[1] in seen
    assert rehearsal.vm.save_screen().read_bytes().startswith(b"\x89PNG")


def look_at_installed(rehearsal: Rehearsal) -> None:
    assert {"box1", "box1.live"} == set(load_pins(rehearsal.machines / "known_hosts"))
    seen = typed(
        rehearsal, "cat /etc/hostname; findmnt --noheadings --output SOURCE /; cat /etc/pacman.d/mirrorlist"
    )
    mirror = load_machine("box1", rehearsal.machines).mirror.servers[0]
    assert seen.startswith("box1\n/dev/vda")
    assert mirror in seen
    environment = {**os.environ, **rehearsal.environment}
    done = subprocess.run(
        fab_command("plan", name="box1"), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 Steps to do" in done.stdout or "nothing to do" in done.stdout.lower(), done.stdout


@pytest.mark.rotating
def test_an_iso_is_booted_as_it_is_and_nothing_is_typed(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then its power is cut, and the disk goes on by itself: `--resume`."""
    signers = Signers()
    try:
        fingerprint = signers.make("release")
        (tmp_path / "work").mkdir()
        image = make_bootable(tmp_path / "archlinux-2026.11.01-x86_64.iso", bed, tmp_path / "work")
        shutil.rmtree(tmp_path / "work")
        signers.sign("release", image)
        iso = check_iso(
            image, tmp_path / "log", signer=fingerprint, keyring=signers.export(tmp_path / "keys", "release")
        )
    finally:
        signers.close()
    python = load_example().python
    folder = tmp_path / "machines"
    folder.mkdir()
    (folder / "box1.toml").write_text(
        BOX1.format(
            identity=keygen(tmp_path / "operator"),
            repository=bed.server.url("repository"),
            wheels=bed.server.url("wheels"),
            torch=python.torch,
            torch_index=python.torch_index,
        )
    )
    monkeypatch.setenv("METAL_MACHINES", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))  # whose keys are none of this test
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    as_typed, again = Rehearsal.provision, Rehearsal.boot_again

    def provision(rehearsal: Rehearsal) -> None:
        look_at_live(rehearsal)
        as_typed(rehearsal)
        look_at_installed(rehearsal)

    def boot_again(rehearsal: Rehearsal) -> None:
        again(rehearsal)
        look_at_installed(rehearsal)

    monkeypatch.setattr(Rehearsal, "provision", provision)
    monkeypatch.setattr(Rehearsal, "boot_again", boot_again)
    machine, output = load_machine("box1", folder), StringIO()
    name = loop.of_person("box1", official=True)

    def go(*, resume: bool) -> str:
        screen = Console(file=output, width=160)
        own = OfficialBed(iso, machine, bed.folder)
        loop.go(own, name, ("provision",), "again", screen, resume=resume, cold=False, keep=False)
        return output.getvalue()

    try:
        said = go(resume=False)
        assert "$ fab -H box1 provision\n" in said, "no fingerprint, no password"
        assert "says nothing on a serial console" in said
        assert "verified" in said
        assert go(resume=True).count("$ fab -H box1 provision\n") == 1, "that was done, and is not done again"
    except BaseException:
        print(output.getvalue())
        raise
    finally:
        image.unlink()
        for disk in (bed.folder / "vm" / name).glob("*.qcow2"):
            disk.unlink()  # gigabytes; the logs stay
