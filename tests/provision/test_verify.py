"""The verification: its bash run for real, against fake trees and programs where a card would be needed."""

import importlib
import os
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from provision.checks import Check, Outcome, parse_checks, render_checks
from provision.errors import ProvisionError
from provision.gpu_checks import OF_PROGRAMS, REBOOT, UVM, compute, driver_modules, gpu_checks
from provision.machine import Machine
from provision.system.layout import layout
from provision.system.python import ENVIRONMENT
from provision.verify import checks


def run(wanted: list[Check], **environment: str) -> list[Outcome]:
    script = f"set -euo pipefail\n{render_checks(wanted)}"
    answer = subprocess.run(
        ["bash"], input=script, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert answer.returncode == 0, answer.stderr
    return parse_checks(wanted, answer.stdout)


def test_all_checks_are_one_exec_and_bash(machine: Machine) -> None:
    wanted = checks(machine, True)
    for check in wanted:
        checked = subprocess.run(["bash", "-n"], input=check.script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr + check.script
    assert len({check.name for check in wanted}) == len(wanted)
    assert {check.name for check in wanted} > {check.name for check in checks(machine, False)}


def test_what_is_seen_decides_the_remedy() -> None:
    causes = (("no such", "make it"), ("denied", "open it"))
    good, denied, other = run(
        [
            Check("a", "echo fine; echo all", "-"),
            Check("b", "echo it is denied >&2; exit 3", "look at it", causes),
            Check("c", r"printf 'one \x1c two \u2028 three\n%%s'; false", "look at it", causes),
        ]
    )
    assert (good.good, good.seen) == (True, "fine all")
    assert (denied.good, denied.seen, denied.check.remedy) == (False, "it is denied", "open it")
    assert (other.good, other.check.remedy) == (False, "look at it")
    assert "three %s" in other.seen
    with pytest.raises(ProvisionError, match="incomplete"):
        parse_checks([good.check, denied.check], "@@check 0 yes fine\n")


def test_what_is_measured_is_told_apart_and_what_hangs_is_ended() -> None:
    measured, late = run(
        [
            Check(
                "a",
                "echo 'figure reads_per_s 12.5'; echo it reads; printf 'a\\ttab\\n'; echo half >&$TELL_FD",
                "-",
            ),
            Check("b", "echo begun; sleep 60", "-", limit_s=1),
        ]
    )
    assert measured.figures == {"reads_per_s": 12.5}
    assert measured.seen == "it reads a tab"
    assert not late.good
    assert late.seen == "begun was not done after 1 s"


MOCK_ROOT = """#!/bin/bash
case "$0 $*" in
  *findmnt*--nofsroot*) echo /dev/mapper/root ;;
  *findmnt*) echo "/dev/mapper/root ext4 rw" ;;
  *lsblk*) printf '%s\\n' $BELOW ;;
esac
"""


def test_the_root_is_one_of_the_partitions_that_we_made(machine: Machine, tmp_path: Path) -> None:
    for name in ("findmnt", "lsblk"):
        (tmp_path / name).write_text(MOCK_ROOT)
        (tmp_path / name).chmod(0o755)
    check = [check for check in checks(machine, False) if check.name == "root file system"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    ours = next(iter(layout(machine).roots))
    for below, good in ((ours, True), (f"x {ours.upper()}", True), ("", False), (ours[:-1], False)):
        assert run(check, PATH=path, BELOW=below)[0].good is good


# --- a machine with cards, which cannot exist here: all of this is a mock ------------------------------------------

MOCKS = {
    "modinfo": '[[ $INSTALLED ]] && echo "$INSTALLED"',
    "pacman": 'echo "nvidia-utils $PACKAGE"',
    "systemctl": 'echo "$DAEMON"; [[ $DAEMON == active ]]',
    "journalctl": 'printf "%b" "$LOG"',
    "nvidia-smi": 'printf "%b" "$SMI"; exit "$SMI_CODE"',
}
LOADING = "NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  610.43.02\\n"
ONE_CARD = "NVIDIA GeForce RTX 4090, 610.43.02, 24564, 35, [N/A]\\n"
OLD_CARD_LOG = (
    "NVRM: The NVIDIA GPU 0000:01:00.0 (PCI ID: 10de:1b06)\\n"
    "NVRM: installed in this system is supported through the NVIDIA 580.xx Legacy drivers.\\nNVRM: No NVIDIA GPU found.\\n"
)


@dataclass
class Box:
    folder: Path

    @property
    def sysfs(self) -> Path:
        return self.folder / "sys"

    @property
    def dev(self) -> Path:
        return self.folder / "dev"

    def load(self, *modules: str) -> None:
        shutil.rmtree(self.sysfs / "module", ignore_errors=True)
        for module in modules:
            (self.sysfs / "module" / module).mkdir(parents=True)
            (self.sysfs / "module" / module / "version").write_text("610.43.02\n")

    def plug(self, slot: str, vendor: str, kind: str) -> None:
        folder = self.sysfs / "bus/pci/devices" / slot
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "class").write_text(kind + "\n")

    def look(self, name: str, **environment: str) -> Outcome:
        defaults = {
            "INSTALLED": "610.43.02", "PACKAGE": "610.43.02-1", "DAEMON": "active", "LOG": LOADING, "SMI": ONE_CARD,
            "SMI_CODE": "0",
        }  # fmt: skip
        wanted = [check for check in gpu_checks(str(self.sysfs), str(self.dev)) if check.name == name]
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return run(wanted, **{**defaults, **environment, "PATH": path})[0]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A machine with one card and its driver, all well."""
    box = Box(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in MOCKS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    box.load("nvidia", "nvidia_uvm")
    box.plug("0000:00:02.0", "0x8086", "0x030000")
    box.plug("0000:01:00.0", "0x10de", "0x030000")
    box.plug("0000:01:00.1", "0x10de", "0x040300")  # its sound
    box.dev.mkdir()
    for name in ("nvidiactl", "nvidia0", "nvidia-uvm"):
        (box.dev / name).symlink_to("/dev/null")
    return box


def test_a_machine_where_all_is_well(box: Box) -> None:
    for check in gpu_checks():
        if check.name != "GPUs compute":
            outcome = box.look(check.name)
            assert outcome.good, f"{check.name}: {outcome.seen}"


@pytest.mark.parametrize(
    ("modules", "installed", "log", "remedy"),
    [
        ("nouveau", "610.43.02", "nouveau: detected AD102", "mkinitcpio --allpresets"),
        ("nvidia nvidia_uvm nouveau", "610.43.02", "", "mkinitcpio --allpresets"),
        ("nova_core", "610.43.02", "", "mkinitcpio --allpresets"),
        ("nvidia", "610.43.02", LOADING, UVM),
        ("", "", "", "dkms status"),
        ("", "610.43.02", OLD_CARD_LOG, "legacy_commit"),
        ("", "610.43.02", "NVRM: ignoring the legacy GPU 0000:01:00.0", "legacy_commit"),
        (
            "",
            "580.178.04",
            "NVRM: installed in this system requires use of the NVIDIA open kernel modules.",
            "needs the open",
        ),
        ("", "610.43.02", "Failed to insert module 'nvidia': Key was rejected by service", "Secure Boot"),
        ("", "610.43.02", "", "sudo modprobe nvidia"),
    ],
)
def test_driver_modules(box: Box, modules: str, installed: str, log: str, remedy: str) -> None:
    box.load(*modules.split())
    outcome = box.look("driver modules", INSTALLED=installed, LOG=log)
    assert not outcome.good
    assert remedy in outcome.check.remedy, outcome.seen


@pytest.mark.parametrize(
    ("loaded", "installed", "package", "good", "remedy"),
    [
        (True, "610.43.02", "610.43.02-1", True, ""),
        (True, "610.43.02", "1:610.43.02-4", True, ""),
        (True, "610.50", "610.50-1", False, REBOOT),
        (True, "", "610.43.02-1", False, REBOOT),
        (True, "610.43.02", "610.50-1", False, "pacman -Syu"),
        (False, "610.43.02", "610.43.02-1", False, REBOOT),
        (False, "", "", False, "dkms status"),
    ],
)
def test_driver_version(
    box: Box, loaded: bool, installed: str, package: str, good: bool, remedy: str
) -> None:
    box.load(*["nvidia"] * loaded)
    outcome = box.look("driver version", INSTALLED=installed, PACKAGE=package)
    assert outcome.good is good, outcome.seen
    assert good or remedy in outcome.check.remedy


def test_a_module_that_dkms_could_not_build(box: Box) -> None:
    """dkms is a mock; its log is a file as make leaves it."""
    log = box.folder / "dkms/nvidia/580.178.04/build/make.log"
    log.parent.mkdir(parents=True)
    log.write_text(
        "CC [M] nv.o\nnv.c:3:10: fatal error: linux/x.h: No such file\nmake: *** [Makefile:9] Error 2\n"
    )
    (box.folder / "bin/dkms").write_text(
        "#!/bin/bash\necho 'nvidia/580.178.04, 6.19.0-arch1-1, x86_64: added'\n"
    )
    (box.folder / "bin/dkms").chmod(0o755)
    box.load("nouveau")
    path = f"{box.folder / 'bin'}:{os.environ['PATH']}"
    check = driver_modules(str(box.sysfs), str(box.folder / "dkms"))
    (outcome,) = run([check], PATH=path, INSTALLED="", LOG="")
    assert not outcome.good
    assert "fatal error: linux/x.h" in outcome.seen
    assert "headers" in outcome.check.remedy
    assert 'system.kernels = ["linux-lts"]' in outcome.check.remedy


def test_device_files_and_daemon(box: Box) -> None:
    (box.dev / "nvidia-uvm").unlink()
    outcome = box.look("device files")
    assert not outcome.good
    assert outcome.seen == f"missing: {box.dev}/nvidia-uvm"
    assert outcome.check.remedy == UVM
    stopped = box.look("persistence daemon", DAEMON="failed")
    assert (stopped.good, stopped.seen) == (False, "failed")


@pytest.mark.parametrize(
    ("said", "code", "remedy"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch\\n", "18", REBOOT),
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\\n",
            "9",
            "see driver modules",
        ),
        ("No devices were found\\n", "6", "fab plan names the right one"),
        ("No devices were found\\n", "0", "fab plan names the right one"),
        (ONE_CARD, "0", "Above 4G Decoding"),
    ],
)
def test_cards(box: Box, said: str, code: str, remedy: str) -> None:
    box.plug("0000:02:00.0", "0x10de", "0x030200")
    outcome = box.look("cards", SMI=said, SMI_CODE=code)
    assert not outcome.good
    assert remedy in outcome.check.remedy, outcome.seen
    assert box.look("cards", SMI=ONE_CARD * 2).good


@pytest.mark.parametrize(
    ("log", "remedy"),
    [
        (
            "NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
            "power cables",
        ),
        ("NVRM: Xid (PCI:0000:01:00): 48, pid=4711, An uncorrectable double bit error", "ECC,ROW_REMAPPER"),
        (
            "NVRM: Xid (PCI:0000:01:00): 119, pid=4711, Timeout after 45s of waiting for RPC response from GPU0 GSP!",
            "xid-errors",
        ),
        ("NVRM: GPU 0000:01:00.0: RmInitAdapter failed! (0x62:0x40:2393)", "xid-errors"),
        ("NVRM: BAR1 is 0M @ 0x0 (PCI:0000:01:00.0)", "Above 4G"),
        (OLD_CARD_LOG, "legacy_commit"),
        (
            "NVRM: API mismatch: the client has the version 610.50, but\\nNVRM: this kernel module has the version 610.43.02.",
            REBOOT,
        ),
        (
            "NVRM: The NVIDIA probe routine was not called for 1 device(s); this module does not include the required GPU",
            "fab plan names the right one",
        ),
    ],
)
def test_faults_in_the_kernel_log(box: Box, log: str, remedy: str) -> None:
    outcome = box.look("kernel log", LOG=f"usb 1-1: new device\\n{LOADING}{log}\\n")
    assert not outcome.good
    assert "NVRM" in outcome.seen
    assert remedy in outcome.check.remedy, outcome.seen


def test_what_programs_did_wrong_and_what_is_no_fault(box: Box) -> None:
    lines = [
        f"NVRM: Xid (PCI:0000:01:00): {number}, pid=4711, name=python, Ch 00000008"
        for number in OF_PROGRAMS.split("|")
    ]
    lines += [
        "NVRM: GPU at PCI:0000:01:00: GPU-5f0c0e0e",
        "NVRM: iovaspaceDestruct_IMPL: 4 left-over mappings in IOVAS 0x100",
    ]
    outcome = box.look("kernel log", LOG=LOADING + "\\n".join(lines) + "\\n")
    assert outcome.good
    assert outcome.seen == "no faults in 3 lines of the driver"
    assert box.look("kernel log", LOG="").good


# --- computing: real torch, on the processor -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def proof() -> types.ModuleType:
    pytest.importorskip("torch")
    return importlib.import_module("provision.programs.compute")


CUDA_126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA_130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "kernels", "good"),
    [
        ((6, 1), CUDA_126, True), ((5, 2), CUDA_126, True), ((7, 5), CUDA_126, True), ((8, 9), CUDA_126, True),
        ((12, 0), CUDA_126, False), ((6, 1), CUDA_130, False), ((7, 0), CUDA_130, False), ((8, 9), CUDA_130, True),
        ((10, 3), CUDA_130, True), ((12, 1), CUDA_130, True), ((13, 0), CUDA_130, True), ((11, 0), CUDA_130, False),
        ((9, 0), ["sm_90a"], True), ((9, 0), [], False),
    ],
)  # fmt: skip
def test_which_kernels_run_where(
    proof: types.ModuleType, capability: tuple[int, int], kernels: list[str], good: bool
) -> None:
    assert proof.fits(capability, kernels) is good


def test_products_are_compared_with_the_processors(
    proof: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = proof.prove_card("cpu", "a processor", (6, 1), CUDA_126)
    assert said == "a processor (sm_61): float32, torch.float16"
    import torch

    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self * 1.01)  # a card that computes wrongly
    with pytest.raises(AssertionError, match=r"a product in torch\.float32 is wrong by 0\.0"):
        proof.multiply("cpu", torch.float32, 1e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_torch_compile_is_proved(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    on_processor = (
        "from provision.programs.compute import *; print(prove_card('cpu', 'a processor', (8, 0), ['sm_80']))"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", on_processor], capture_output=True, text=True, env=environment
    )
    assert ran.stdout == "a processor (sm_80): float32, torch.bfloat16, torch.compile\n", ran.stderr


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (
            "AssertionError: Tesla P40 is sm_61, and torch 2.13.0 has no kernels for it, only for ['sm_75']",
            "chooses by the cards",
        ),
        (
            "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device",
            "chooses by the cards",
        ),
        ("RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment", UVM),
        ("RuntimeError: Found no NVIDIA driver on your system.", "see driver modules"),
        ("RuntimeError: The NVIDIA driver on your system is too old (found version 12040).", "newer driver"),
        ("InductorError: RuntimeError: Failed to find C compiler.", "no compiler"),
        ("AssertionError: cuda:0: a product in torch.float32 is wrong by 0.5", "a fault of the card"),
    ],
)
def test_what_torch_says_decides_the_remedy(tmp_path: Path, said: str, remedy: str) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/bash\necho "Traceback (most recent call last):"; echo "{said}"; exit 1\n')
    python.chmod(0o755)
    check = compute()
    (outcome,) = run(
        [Check(check.name, check.script.replace(ENVIRONMENT, str(tmp_path)), check.remedy, check.causes)]
    )
    assert not outcome.good
    assert remedy in outcome.check.remedy


def test_without_a_card_torch_says_so() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    check = compute()
    (outcome,) = run(
        [Check(check.name, check.script.replace(f"{ENVIRONMENT}/bin/python", sys.executable), "-")]
    )
    assert not outcome.good
    assert "Error" in outcome.seen
