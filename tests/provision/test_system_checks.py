"""Each fault that the checks of every machine know, injected, and the remedy that is told.

Real: mount points, fstab and findmnt, full file systems, a unit that fails under the stand-in systemctl, a kernel's
header, folders of an ESP. Mocked, for there is no such thing here: efibootmgr, the kernel's log, a btrfs root.
"""

import os
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from provision.checks import Check, Outcome
from provision.machine import Machine
from provision.system.python import ENVIRONMENT
from provision.system_checks import (
    boot_entries,
    clock,
    clock_is_right,
    disks,
    failed_units,
    free_space,
    fstab,
    kernel_modules,
    learns,
    system_checks,
)
from provision.verify import judge_clock
from tests.provision.test_verify import run
from tests.sshd import STANDIN, wait_for

ESP = "6d0a3c5e-0000-4000-8000-000000000001"
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts in a namespace of its own")


def programs(folder: Path, **texts: str) -> str:
    """PATH with these programs first: each a bash script."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def bad(outcome: Outcome, seen: str, remedy: str) -> None:
    assert not outcome.good, outcome.seen
    assert seen in outcome.seen
    assert remedy in outcome.check.remedy, outcome.check.remedy


def test_no_two_checks_have_one_name_and_each_has_a_remedy(machine: Machine) -> None:
    found = system_checks(machine)
    assert len({check.name for check in found}) == len(found)
    for check in found:
        assert check.remedy.strip()


# --- booting again ---------------------------------------------------------------------------------------------------


def kernel(version: str) -> bytes:
    """The head of a bzImage: where its version is stands at 0x20e, less 0x200."""
    image = bytearray(4096)
    struct.pack_into("<H", image, 0x20E, 0xC00)
    image[0xE00 : 0xE00 + len(version) + 20] = f"{version} (build@host) #1\0\0\0".encode()[
        : len(version) + 20
    ]
    return bytes(image)


@pytest.fixture
def esp(tmp_path: Path) -> Path:
    """An ESP as we make it, and the modules of its kernel."""
    boot = tmp_path / "boot"
    files = {
        "loader/loader.conf": b"default arch-linux-lts.conf\ntimeout 3\neditor no\n",
        "loader/entries/arch-linux-lts.conf": b"title Arch\nlinux /vmlinuz-linux-lts\ninitrd /initramfs-linux-lts.img\noptions quiet\n",
        "vmlinuz-linux-lts": kernel("6.18.44-1-lts"),
        "initramfs-linux-lts.img": b"cpio",
        "EFI/systemd/systemd-bootx64.efi": b"MZ",
        "EFI/BOOT/BOOTX64.EFI": b"MZ",
    }
    for name, data in files.items():
        (boot / name).parent.mkdir(parents=True, exist_ok=True)
        (boot / name).write_bytes(data)
    (tmp_path / "modules/6.18.44-1-lts/kernel").mkdir(parents=True)
    return boot


def look_at_boot(esp: Path, firmware: str = f"Boot0001* Linux Boot Manager HD(1,GPT,{ESP},0x800)") -> Outcome:
    path = programs(esp.parent / "bin", efibootmgr=f"echo '{firmware}'; [[ '{firmware}' != EFI* ]]")
    return run([boot_entries(("linux-lts",), ESP, str(esp), str(esp.parent / "modules"))], PATH=path)[0]


def test_what_boots_is_all_there(esp: Path) -> None:
    outcome = look_at_boot(esp)
    assert outcome.good, outcome.seen
    assert outcome.seen == "arch-linux-lts.conf, and 1 in all"


@pytest.mark.parametrize(
    ("break_it", "seen", "remedy"),
    [
        (lambda esp: (esp / "loader/entries/arch-linux-lts.conf").unlink(), "there is no entry for linux-lts", "may not boot again"),
        (lambda esp: (esp / "loader/loader.conf").unlink(), "boots 'nothing', which is no entry", "may not boot again"),
        (lambda esp: (esp / "initramfs-linux-lts.img").write_bytes(b""), "initramfs-linux-lts.img, which is empty", "mkinitcpio --allpresets"),
        (lambda esp: (esp / "vmlinuz-linux-lts").unlink(), "names /vmlinuz-linux-lts, which is empty or missing", "fab provision"),
        (lambda esp: (esp / "vmlinuz-linux-lts").write_bytes(kernel("6.18.50-1-lts")), "is 6.18.50-1-lts, which has no modules", "different versions"),
        (lambda esp: (esp / "vmlinuz-linux-lts").write_bytes(b"short"), "is no kernel, which has no modules", "different versions"),
        (lambda esp: (esp / "EFI/BOOT/BOOTX64.EFI").unlink(), "systemd-boot is missing: EFI/BOOT/BOOTX64.EFI", "fab provision"),
    ],
)  # fmt: skip
def test_what_is_missing_on_the_esp_is_named(
    esp: Path, break_it: Callable[[Path], object], seen: str, remedy: str
) -> None:
    break_it(esp)
    bad(look_at_boot(esp), seen, remedy)


def test_a_firmware_that_forgot_and_one_that_cannot_be_asked(esp: Path) -> None:
    bad(look_at_boot(esp, "Boot0000* Windows Boot Manager"), "no entry for this disk", "battery is empty")
    bad(
        look_at_boot(esp, "EFI variables are not supported on this system."),
        "efibootmgr: EFI",
        "not booted by UEFI",
    )
    other_disk = f"Boot0001* Linux Boot Manager HD(1,GPT,{ESP[:-1]}9,0x800)"
    bad(look_at_boot(esp, other_disk), "no entry for this disk", "battery is empty")


def test_the_running_kernel_has_its_modules(tmp_path: Path) -> None:
    """`uname` is a mock: which kernels have modules here differs between computers."""
    path = programs(tmp_path / "bin", uname="echo 9.9.9-no-such")
    bad(run([kernel_modules()], PATH=path)[0], "9.9.9-no-such", "reboot")


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seen", "remedy"),
    [
        ("proc /proc proc\nnonsense\n", "parse error", "A line cannot be read"),
        ("UUID=0000-0000 /mnt ext4 defaults 0 0\n", "UUID=0000-0000", "is it plugged in"),
        ("tmpfs FOLDER tmpfs defaults 0 0\n", "FOLDER is not mounted (tmpfs)", "sudo mount --all"),
        ("tmpfs FOLDER\\040two tmpfs defaults 0 0\n", "FOLDER two is not mounted", "sudo mount --all"),
        ("FOLDER/swap none swap defaults 0 0\n", "swap FOLDER/swap is not in use", "swapon --all"),
        ("tmpfs FOLDER/none tmpfs defaults 0 0\n", "FOLDER/none", "folder to mount on is missing"),
    ],
)
def test_a_wrong_fstab(tmp_path: Path, text: str, seen: str, remedy: str) -> None:
    (tmp_path / "two words").mkdir()
    folder = tmp_path / "there"
    folder.mkdir()
    (tmp_path / "there two").mkdir()
    (folder / "swap").touch()
    (tmp_path / "fstab").write_text(text.replace("FOLDER", str(folder)))
    bad(run([fstab(str(tmp_path / "fstab"))])[0], seen.replace("FOLDER", str(folder)), remedy)


def test_a_right_fstab(tmp_path: Path) -> None:
    (tmp_path / "fstab").write_text(
        f"# comment\n\nproc /proc proc defaults 0 0\ntmpfs {tmp_path} tmpfs noauto,size=1m 0 0\n"
    )
    outcome = run([fstab(str(tmp_path / "fstab"))])[0]
    assert outcome.good, outcome.seen
    assert outcome.seen == "1 entries, all in use"


QUIET = {
    "journalctl": 'printf "%b" "$LOG"',
    "findmnt": 'case "$*" in *FSTYPE*) echo $ROOT ;; *) printf "%b" "$MOUNTS" ;; esac',
}
BTRFS = {"btrfs": 'case "$*" in "device stats --check /") [[ ! $ERRORS ]] ;; "device stats /") printf "%b" "$ERRORS" ;; *) printf "%b" "$DEVICES" ;; esac'}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "seen", "remedy"),
    [
        ({"LOG": "I/O error, dev nvme0n1, sector 5 op 0x0:(READ)\\n"}, "I/O error, dev nvme0n1", "smartctl"),
        ({"LOG": "nvme nvme0: controller is down; will reset: CSTS=0xffffffff\\n"}, "controller is down", "default_ps_max_latency_us"),
        ({"LOG": "ata3.00: failed command: READ FPDMA QUEUED\\n"}, "ata3.00", "cable"),
        ({"LOG": "EXT4-fs error (device nvme0n1p2): ext4_lookup:1855\\n"}, "EXT4-fs error", "memtest86+"),
        ({"LOG": "EXT4-fs (sda2): Remounting filesystem read-only\\n"}, "read-only", "journalctl"),
        ({"MOUNTS": "/ rw,relatime\\n/home ro,relatime\\n"}, "/home is read-only", "turned read-only"),
        ({"ROOT": "btrfs", "DEVICES": "*** Some devices missing\\n"}, "devices missing", "nothing is twice"),
        ({"ROOT": "btrfs", "ERRORS": "[/dev/nvme0n1p2].corruption_errs  7\\n[/dev/nvme0n1p2].write_io_errs  0\\n"}, "corruption_errs 7", "memtest86+"),
    ],
)  # fmt: skip
def test_what_kernel_and_btrfs_say_of_disks(
    tmp_path: Path, environment: dict[str, str], seen: str, remedy: str
) -> None:
    """All mocks: no disk here is broken, and no root is btrfs."""
    path = programs(tmp_path / "bin", **QUIET, **BTRFS)
    well = {
        "LOG": "usb 1-1: new device\\n",
        "ROOT": "ext4",
        "MOUNTS": "/ rw\\n",
        "ERRORS": "",
        "DEVICES": "ok\\n",
    }
    assert run([disks()], PATH=path, **well)[0].good
    assert run([disks()], PATH=path, **{**well, "ROOT": "btrfs"})[0].good
    outcome = run([disks()], PATH=path, **{**well, **environment})[0]
    bad(replace(outcome, seen=" ".join(outcome.seen.split())), seen, remedy)
    assert "write_io_errs" not in outcome.seen


def in_namespace(check: Check, setup: str) -> Outcome:
    """The check where `setup` mounted something that nobody else sees."""
    script = f"unshare --mount --propagation private bash -c {setup!r}' && exec bash -c \"$0\"' "
    inner = Check(check.name, f"{script}{_quote(check.script)}", check.remedy, check.causes)
    return run([inner])[0]


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


@ROOT_ONLY
@pytest.mark.parametrize(
    ("options", "fill", "seen", "remedy"),
    [
        ("size=2m", "head -c 2000000 /dev/zero > FOLDER/full", "has 0 MiB left, and needs 1", "fab remove"),
        ("size=8m,nr_inodes=20", "true", "more files", "du --inodes"),
        ("size=8m", "true", "", ""),
    ],
)
def test_a_full_disk(tmp_path: Path, options: str, fill: str, seen: str, remedy: str) -> None:
    """A real file system in memory, really full: of bytes, or of files."""
    setup = f"mount -t tmpfs -o {options} tmpfs {tmp_path} && {fill.replace('FOLDER', str(tmp_path))}"
    outcome = in_namespace(free_space({str(tmp_path): 1}), setup)
    if seen:
        bad(outcome, seen, remedy)
    else:
        assert outcome.good, outcome.seen


def test_a_full_esp_is_told_apart() -> None:
    assert "system.kernels" in free_space().remedy_for("/boot has 3 MiB left, and needs 32; ")


# --- units, clock, environment ---------------------------------------------------------------------------------------


@ROOT_ONLY
def test_a_unit_that_failed_is_named_with_its_last_words(tmp_path: Path) -> None:
    """A real process under the stand-in systemctl; the journal is a mock."""
    base = Path("/run/standin-systemd")
    if base.exists():
        pytest.skip("somebody else's stand-in units are there")
    path = programs(
        tmp_path / "bin", journalctl='echo "cannot write: No space left on device"; echo "Failed to start x"'
    )
    path = f"{tmp_path / 'bin'}:{STANDIN}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    assert run([failed_units()], PATH=path)[0].good
    try:
        subprocess.run(["systemd-run", "--unit=broken", "--", "/bin/false"], env=environment, check=True)
        wait_for(lambda: (base / "broken/ActiveState").read_text() == "failed\n", "the unit to fail")
        outcome = run([failed_units()], PATH=path)[0]
        bad(outcome, "broken.service (cannot write: No space left on device)", "A disk is full")
        subprocess.run(["systemctl", "reset-failed", "broken"], env=environment, check=True)
        assert run([failed_units()], PATH=path)[0].good
    finally:
        subprocess.run(["rm", "-rf", str(base), "/run/standin-journal-broken"], check=True)


@pytest.mark.parametrize(
    ("seen", "remedy"),
    [
        ("systemd-modules-load.service;", "reboot"),
        ("data.mount;", "see fstab"),
        ("metal-run-20261101-120000-demo.service;", "fab resume"),
        ("nginx.service;", "systemctl status UNIT"),
    ],
)
def test_which_unit_failed_decides_the_remedy(seen: str, remedy: str) -> None:
    assert remedy in failed_units().remedy_for(seen)


def test_the_clock_is_compared_with_this_computers() -> None:
    assert clock_is_right(1000.0, 990, 1010)
    assert clock_is_right(940, 1000, 1010)
    assert not clock_is_right(939, 1000, 1010)
    assert clock_is_right(1070, 1000, 1010)
    assert not clock_is_right(1071, 1000, 1010)
    now = time.time()
    seen = run([clock()])[0]
    right = judge_clock(seen, now, time.time())
    assert right.good
    assert right.figures == {}
    wrong = judge_clock(seen, now + 3600, time.time() + 3600)
    bad(wrong, " s behind this computer's", "set-ntp true")


def test_an_environment_that_is_not_there_or_does_not_see_the_card(tmp_path: Path) -> None:
    check = learns(True)
    elsewhere = replace(check, script=check.script.replace(ENVIRONMENT, str(tmp_path / "env")))
    bad(run([elsewhere])[0], "No such file", "fab provision makes it")
    (tmp_path / "env/bin").mkdir(parents=True)
    programs(tmp_path / "env/bin", python="echo 'AssertionError: torch does not see the GPU' >&2; exit 1")
    bad(run([elsewhere])[0], "does not see", "one for processors")
