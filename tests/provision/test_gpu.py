"""Which driver and which wheels for which cards and kernels, decided before the wipe; the legacy driver's Steps, run."""

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provision.errors import ProvisionError
from provision.facts import Facts, GpuSeen
from provision.machine import Machine
from provision.steps import Step, merge_packages, prelude
from provision.system import system
from provision.system.aur import fetch_source
from provision.system.gpu import (
    FLAVOURS,
    Driver,
    choose_driver,
    gpu,
    gpu_services,
    modules_exist,
    other_drivers,
    persistenced,
)
from provision.system.legacy import LEGACY, SOURCE, build_packages, legacy_driver
from provision.system.python import CPU_INDEX, LEGACY_INDEX, check_torch, python, torch_index
from tests.git import git
from tests.provision.test_system import GOLDEN, NOW, installed, render

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ADA, AMPERE, HOPPER, TURING, BLACKWELL = 0x2684, 0x2204, 0x2330, 0x1E04, 0x2B85
PASCAL, VOLTA, MAXWELL, KEPLER = 0x1B06, 0x1DB4, 0x13C0, 0x102D
LTS = ("linux-lts",)


def cards(*devices: int) -> tuple[GpuSeen, ...]:
    return tuple(GpuSeen(f"0000:{slot:02x}:00.0", device) for slot, device in enumerate(devices, 1))


def chosen(
    *devices: int, kernels: tuple[str, ...] = LTS, commit: str = COMMIT, wanted: str = "auto"
) -> Driver | None:
    return choose_driver(wanted, cards(*devices), kernels, commit)


def packages(*devices: int, kernels: tuple[str, ...] = LTS) -> tuple[str, ...]:
    driver = chosen(*devices, kernels=kernels)
    return driver.packages if driver else ()


def with_cards(facts: Facts, *devices: int, installed: bool = False) -> Facts:
    return replace(facts, gpus=cards(*devices), system="installed" if installed else "live")


def wishing(machine: Machine, **wishes: object) -> Machine:
    return replace(machine, gpu=replace(machine.gpu, **wishes))  # type: ignore[arg-type]


# --- the driver by PCI id ------------------------------------------------------------------------------------

FAMILY_OF_NAME = (  # by NVIDIA's marketing names, where they say it (the RTX 3050 A is an Ada)
    (r"GeForce RTX 50|\bB[23]00|GB[23]|PRO .*Blackwell", "Blackwell or newer"),
    (r"GeForce RTX 40|\bL4\b|\bL40|Ada Generation", "Ada"),
    (r"\bH[128]00|GH200", "Hopper"),
    (r"GeForce RTX 30(?!50 A)|\bA100|\bA10\b|\bA40\b|RTX A[1-6]000", "Ampere"),
    (r"GeForce RTX 20[678]0|GTX 16|TITAN RTX|Tesla T4|Quadro RTX", "Turing"),
)


def published_ids() -> list[tuple[int, str]]:
    lines = (GOLDEN.parent.parent / "fixtures" / "nvidia-open-ids.txt").read_text().splitlines()
    return [(int(line[:4], 16), line[5:]) for line in lines if not line.startswith("#")]


def test_every_id_that_nvidia_publishes_gets_the_open_modules_and_its_family() -> None:
    named = 0
    for device, name in published_ids():
        driver = chosen(device, commit="")
        assert driver
        assert driver.packages == ("nvidia-open-lts", "nvidia-utils")
        if wanted := next((family for pattern, family in FAMILY_OF_NAME if re.search(pattern, name)), ""):
            assert f"({wanted})" in driver.reason, f"{device:04x} {name}: {driver.reason}"
            named += 1
    assert len(published_ids()) == 289
    assert named > 200


def test_every_id_there_can_be_has_one_branch_and_those_published_are_none_of_the_old(
    machine: Machine, live: Facts
) -> None:
    branches = {"refused": set[int](), "legacy": set[int](), "open": set[int]()}
    for device in range(0x10000):
        try:
            driver = chosen(device)
        except ProvisionError:
            branches["refused"].add(device)
        else:
            assert driver
            branches["legacy" if driver.legacy else "open"].add(device)
    assert branches["refused"] == set(range(0x1340))
    assert branches["legacy"] == set(range(0x1340, 0x1E00))
    assert {device for device, _ in published_ids()} <= branches["open"]


@pytest.mark.parametrize(
    ("device", "legacy"),
    [  # as the cards call themselves; ids from pci-ids.ucw.cz
        (0x102D, False), (0x1180, False), (0x1004, False), (0x128B, False), (0x1287, False), (0x0FFE, False),  # Kepler: K80 …
        (0x1340, True), (0x1380, True), (0x13C0, True), (0x17C8, True), (0x1617, True), (0x174D, True),  # Maxwell: 750 Ti, 980 …
        (0x15F8, True), (0x1B06, True), (0x1B38, True), (0x1C03, True), (0x1D01, True), (0x1D10, True),  # Pascal: P100, 1080 Ti, P40 …
        (0x1D81, True), (0x1DB1, True), (0x1DB6, True), (0x1DBA, True), (0x1DF6, True),  # Volta: TITAN V, V100 …
    ],
)  # fmt: skip
def test_old_cards_by_name(device: int, legacy: bool) -> None:
    if legacy:
        driver = chosen(device)
        assert driver
        assert driver.legacy
    else:
        with pytest.raises(ProvisionError, match="too old"):
            chosen(device)


@given(st.lists(st.sampled_from([device for device, _ in published_ids()]), min_size=1, max_size=8))
def test_any_mix_of_turing_and_newer_shares_the_open_modules(devices: list[int]) -> None:
    assert packages(*devices) == ("nvidia-open-lts", "nvidia-utils")


@given(
    old=st.lists(st.integers(0x1340, 0x1DFF), min_size=1, max_size=4),
    other=st.lists(st.integers(0x1340, 0xFFFF), max_size=4),
    kernels=st.lists(st.sampled_from(["linux", "linux-lts", "linux-zen"]), min_size=1, max_size=4),
    place=st.integers(0, 8),
)
def test_a_mix_with_an_old_card_is_legacy_or_refused_for_a_new_one(
    old: list[int], other: list[int], kernels: list[str], place: int
) -> None:
    devices = [*other[:place], *old, *other[place:]]
    if new := [device for device in devices if device >= 0x2900]:
        with pytest.raises(ProvisionError) as caught:
            chosen(*devices, kernels=tuple(kernels))
        assert all(f"10de:{device:04x}" in caught.value.message for device in [*old, *new])
        assert "only open ones" in caught.value.message
    else:
        driver = chosen(*devices, kernels=tuple(kernels))
        assert driver
        assert driver.legacy
        assert driver.packages == ("dkms", *(f"{kernel}-headers" for kernel in dict.fromkeys(kernels)))
        with pytest.raises(ProvisionError, match="only in the AUR"):
            chosen(*devices, kernels=tuple(kernels), commit="")


@given(st.lists(st.integers(0x1340, 0xFFFF), max_size=3), st.integers(0, 0x133F), st.integers(0, 3))
def test_one_ancient_card_is_enough_to_refuse(devices: list[int], ancient: int, place: int) -> None:
    with pytest.raises(ProvisionError, match=f"10de:{ancient:04x}, Kepler or older.*too old"):
        chosen(*devices[:place], ancient, *devices[place:])
    assert chosen(*devices, ancient, wanted="none") is None


# --- kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernels", "wanted"),
    [
        (("linux",), "nvidia-open nvidia-utils"),
        (("linux-lts",), "nvidia-open-lts nvidia-utils"),
        (("linux-lts", "linux-lts"), "nvidia-open-lts nvidia-utils"),
        (("linux-zen",), "nvidia-open-dkms linux-zen-headers nvidia-utils"),
        (("linux", "linux-lts"), "nvidia-open-dkms linux-headers linux-lts-headers nvidia-utils"),
        (("linux-hardened", "linux"), "nvidia-open-dkms linux-hardened-headers linux-headers nvidia-utils"),
    ],
)
def test_the_modules_fit_the_kernels(kernels: tuple[str, ...], wanted: str) -> None:
    assert " ".join(packages(ADA, kernels=kernels)) == wanted


KERNEL_SETS = st.lists(
    st.sampled_from(["linux", "linux-lts", "linux-zen", "linux-rt-lts"]), min_size=1, unique=True
)


@given(KERNEL_SETS, st.sampled_from([ADA, PASCAL]))
def test_every_kernel_gets_modules_from_exactly_one_package(kernels: list[str], device: int) -> None:
    driver = chosen(device, kernels=tuple(kernels))
    assert driver
    headers = {f"{kernel}-headers" for kernel in kernels}
    if driver.built_here:
        assert headers <= set(driver.packages)
    else:
        assert len(kernels) == 1
    assert sum(name in FLAVOURS for name in driver.packages) == (0 if driver.legacy else 1)


def test_kernel_and_driver_come_in_one_transaction(machine: Machine, live: Facts) -> None:
    both = replace(machine, system=replace(machine.system, kernels=("linux-lts", "linux")))
    for there in (False, True):
        facts = with_cards(live, ADA, installed=there)
        merged = [
            step for step in merge_packages([*gpu(both, facts), *gpu_services(both, facts)]) if step.packages
        ]
        assert len(merged) == 1
        assert {"nvidia-open-dkms", "linux-headers", "linux-lts-headers", "nvidia-utils"} <= set(
            merged[0].packages
        )


# --- before the wipe -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "wishes", "reason"),
    [
        ((PASCAL,), {}, "580xx legacy branch, which Arch has only in the AUR"),
        ((VOLTA, ADA), {}, r"0000:01:00\.0 \(10de:1db4, Maxwell, Pascal or Volta\).*580xx legacy"),
        ((KEPLER, ADA), {"legacy_commit": COMMIT}, "10de:102d, Kepler or older.*too old"),
        ((MAXWELL, BLACKWELL), {"legacy_commit": COMMIT}, "No one driver drives both .*13c0.* and .*2b85"),
        ((PASCAL,), {"legacy_commit": COMMIT, "driver": "open"}, "the open kernel modules do not drive"),
        (
            (PASCAL,),
            {"legacy_commit": COMMIT, "cuda": True},
            "gpu.cuda is true, and Arch's cuda is version 13",
        ),
    ],
)
def test_refused_on_the_iso(
    machine: Machine, live: Facts, devices: tuple[int, ...], wishes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ProvisionError, match=reason) as caught:
        system(wishing(machine, **wishes), with_cards(live, *devices), NOW)
    assert "machine file:" in caught.value.hint
    without = wishing(machine, driver="none")
    steps = system(without, with_cards(live, *devices), NOW)
    assert not any("nvidia" in name for step in steps for name in step.packages)


def test_the_refusal_says_what_to_read_and_what_to_set(machine: Machine, live: Facts) -> None:
    with pytest.raises(ProvisionError) as caught:
        system(machine, with_cards(live, PASCAL), NOW)
    for said in (
        "git clone https://aur.archlinux.org/nvidia-580xx-utils.git && cd nvidia-580xx-utils && more PKGBUILD",
        "[gpu] legacy_commit = ",
        "git rev-parse HEAD",
        '[gpu] driver = "none"',
    ):
        assert said in caught.value.hint


def test_a_driver_for_a_card_to_come(machine: Machine, live: Facts) -> None:
    driver = chosen(wanted="open", commit="")
    assert driver
    assert driver.packages == ("nvidia-open-lts", "nvidia-utils")
    waiting = wishing(machine, driver="open")
    assert not any("persistenced" in step.name for step in gpu_services(waiting, replace(live, gpus=())))


def test_cuda_and_the_container_toolkit_are_switches(machine: Machine, live: Facts) -> None:
    both = {"cuda", "nvidia-container-toolkit"}
    wished = wishing(machine, cuda=True, container_toolkit=True)
    assert both <= {name for step in gpu(wished, live) for name in step.packages}
    assert not both & {name for step in gpu(machine, live) for name in step.packages}


# --- torch ----------------------------------------------------------------------------------------------------------


def wanting(machine: Machine, **wishes: object) -> Machine:
    return replace(machine, python=replace(machine.python, **wishes))  # type: ignore[arg-type]


def test_where_torch_comes_from(machine: Machine, live: Facts) -> None:
    assert torch_index(machine, live) == ""
    assert torch_index(machine, replace(live, gpus=())) == CPU_INDEX
    assert torch_index(wishing(machine, driver="none"), live) == CPU_INDEX
    assert torch_index(machine, with_cards(live, PASCAL)) == LEGACY_INDEX
    assert torch_index(machine, with_cards(live, ADA, HOPPER, VOLTA)) == LEGACY_INDEX
    own = wanting(machine, torch_index="https://example.org/whl")
    for facts in (live, with_cards(live, PASCAL), replace(live, gpus=())):
        assert torch_index(own, facts) == "https://example.org/whl"


def test_every_published_card_gets_the_default_index_and_every_older_one_that_of_cuda_12(
    machine: Machine, live: Facts
) -> None:
    for device, _ in published_ids():
        assert torch_index(machine, with_cards(live, device)) == ""
    for device in range(0x1340, 0x1E00):
        assert torch_index(machine, with_cards(live, device)) == LEGACY_INDEX


@pytest.mark.parametrize(
    ("torch", "good"),
    [
        ("torch==2.13.*", True), ("torch==2.14.1", True), ("torch==2.13.0+cu126", True), ("torch>=2.6", True), ("torch", True),
        ("torch~=2.14", True), ("torch>=2.13,<2.15", True), ("torch<3,!=2.13.0", True),
        ("torch @ https://example.org/torch-2.15.0-cp312-cp312-linux_x86_64.whl", True),
        ("torch==2.15.*", False), ("torch>=2.15", False), ("torch~=2.15", False), ("torch==2.13.0+cu130", False),
        ("torch>2.14.9", False), ("torch==2.7.1", False), ("torch 2.13", False), ("torch==", False),
    ],
)  # fmt: skip
def test_a_torch_without_kernels_for_old_cards_is_refused_before_the_wipe(
    machine: Machine, live: Facts, torch: str, good: bool
) -> None:
    wished = wanting(wishing(machine, legacy_commit=COMMIT), torch=torch)
    old = with_cards(live, PASCAL, ADA)
    if good:
        system(wished, old, NOW)
    else:
        with pytest.raises(ProvisionError, match=r"python\.torch"):
            system(wished, old, NOW)
    check_torch(wished, live)  # newer cards alone take any
    check_torch(wanting(wished, torch_index="https://example.org/whl"), old)


def test_the_index_is_used(machine: Machine, live: Facts) -> None:
    script = list(python(machine, with_cards(live, PASCAL, installed=True)))[-1].script
    assert (
        f'--index-url {LEGACY_INDEX} --python "$folder/bin/python" "${{held[@]}}" \'torch==2.13.*\'' in script
    )


# --- one driver in place of another ----------------------------------------------------------------------------------


def bash(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def probed(step: Step, root: str = "", **environment: str) -> str:
    """A probe's output, as `render_probes` would have it: without `set -e`."""
    return bash(f"{prelude(root)}set +eo pipefail\n{step.probe}", **environment).stdout


MOCK_PACMAN = """#!/bin/bash
# A mock: no pacman with NVIDIA's packages can be had here. It lists $INSTALLED and says what it is asked for.
if [[ $1 == -Qq ]]; then printf '%s\\n' $INSTALLED; else echo "pacman $*"; fi
"""


@pytest.fixture
def mock_pacman(tmp_path: Path) -> str:
    (tmp_path / "pacman").write_text(MOCK_PACMAN)
    (tmp_path / "pacman").chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("device", "kernels", "there", "goes"),
    [
        (ADA, ("linux-lts",), "linux-lts nvidia-open-lts nvidia-utils", ""),
        (ADA, ("linux-lts", "linux"), "nvidia-open-lts nvidia-utils bash", "nvidia-open-lts"),
        (ADA, ("linux",), "nvidia-open-dkms linux-zen-headers nvidia-utils", "nvidia-open-dkms"),
        (ADA, ("linux",), "zsh nvidia-580xx-dkms bash nvidia-580xx-utils opencl-nvidia-580xx",
         "nvidia-580xx-dkms nvidia-580xx-utils opencl-nvidia-580xx"),
        (PASCAL, ("linux",), "nvidia-open nvidia-utils", "nvidia-open nvidia-utils"),
        (PASCAL, ("linux",), "nvidia-580xx-dkms nvidia-580xx-utils dkms", ""),
        (ADA, ("linux",), "bash", ""),
    ],
)  # fmt: skip
def test_what_conflicts_goes_first(
    machine: Machine,
    live: Facts,
    mock_pacman: str,
    device: int,
    kernels: tuple[str, ...],
    there: str,
    goes: str,
) -> None:
    machine = wishing(replace(machine, system=replace(machine.system, kernels=kernels)), legacy_commit=COMMIT)
    (step,) = other_drivers(machine, with_cards(live, device, installed=True))
    assert step.disturbs_runs
    assert probed(step, PATH=mock_pacman, INSTALLED=there).split() == goes.split()
    if goes:
        said = bash(prelude("") + step.script, PATH=mock_pacman, INSTALLED=there).stdout
        assert said == f"pacman -Rdd --noconfirm --noprogressbar {goes}\n"


def test_nothing_is_removed_from_an_unfinished_root_or_without_a_driver(
    machine: Machine, live: Facts, tmp_path: Path
) -> None:
    (step,) = other_drivers(machine, live)
    assert probed(step, str(tmp_path)) == ""
    assert not list(other_drivers(machine, replace(live, gpus=())))
    names = [step.name for step in system(machine, live, NOW)]
    assert names.index("no other NVIDIA driver") < next(
        i for i, name in enumerate(names) if name.startswith("install ")
    )


# --- modules and daemon ------------------------------------------------------------------------------------------------

MOCK_CHROOT = """#!/bin/bash
# A mock: no kernel with an nvidia module can be had here. `modinfo` finds what stands as a file in the root; `dkms`
# makes it, but for the kernel that $BROKEN names.
root=$1; shift
case $1 in
  modinfo) [[ -e $root/usr/lib/modules/$3/nvidia.ko ]] ;;
  dkms)
    case $2 in
      status) echo "nvidia/580.178.04, 7.2.1-lts: added" ;;
      autoinstall) [[ $4 != "$BROKEN" ]] && touch "$root/usr/lib/modules/$4/nvidia.ko" ;;
    esac ;;
esac
"""


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A root with two kernels that packages own, and what a third left behind; mocks on PATH."""
    for version, package in (("7.2.1-lts", "linux-lts"), ("7.3.4-arch1-1", "linux"), ("6.9.9-arch1-1", "")):
        folder = tmp_path / "root" / "usr" / "lib" / "modules" / version
        folder.mkdir(parents=True)
        if package:
            (folder / "pkgbase").write_text(package + "\n")
    for program in ("chroot", "arch-chroot"):
        (tmp_path / program).write_text(MOCK_CHROOT)
        (tmp_path / program).chmod(0o755)
    return tmp_path


def test_a_module_that_dkms_did_not_build_is_built_or_named(kernels: Path) -> None:
    root, path = kernels / "root", f"{kernels}:{os.environ['PATH']}"
    step = modules_exist(("linux-lts", "linux"), built_here=True)
    assert probed(step, str(root), PATH=path).split() == ["7.2.1-lts", "7.3.4-arch1-1"]
    log = root / "var/lib/dkms/nvidia/580.178.04/build/make.log"
    log.parent.mkdir(parents=True)
    log.write_text("make\nerror: implicit declaration of function 'dma_is_direct'\n")
    failed = bash(prelude(str(root)) + step.script, PATH=path, BROKEN="7.3.4-arch1-1")
    assert failed.returncode == 1
    for said in (
        "DKMS built no nvidia module for: 7.3.4-arch1-1\n",
        "nvidia/580.178.04, 7.2.1-lts: added",
        f"the end of {log}:",
        "implicit declaration",
        'system.kernels = ["linux-lts"]',
    ):
        assert said in failed.stdout
    assert bash(prelude(str(root)) + step.script, PATH=path, BROKEN="").returncode == 0
    assert step.is_done(probed(step, str(root), PATH=path))


def test_a_root_without_kernels_is_not_taken_for_done(tmp_path: Path) -> None:
    assert probed(modules_exist(("linux-lts", "linux"), built_here=True), str(tmp_path)).split() == [
        "linux-lts",
        "linux",
    ]


def test_only_the_kernels_of_the_machine_file_need_a_module(kernels: Path) -> None:
    root, path = kernels / "root", f"{kernels}:{os.environ['PATH']}"
    (root / "usr/lib/modules/7.2.1-lts/nvidia.ko").touch()
    assert probed(modules_exist(("linux-lts",), built_here=False), str(root), PATH=path) == ""
    both = modules_exist(("linux-lts", "linux"), built_here=False)
    failed = bash(prelude(str(root)) + both.script, PATH=path)
    assert failed.returncode == 1
    assert "no module for: 7.3.4-arch1-1: the mirror is between two updates" in failed.stdout


def test_the_daemon_waits_for_a_boot_with_the_driver(machine: Machine, live: Facts) -> None:
    assert "[[ ! $root && -e /sys/module/nvidia/version" in persistenced().probe
    said = probed(persistenced())  # no driver is loaded here
    assert said.splitlines()[-1] == "active"
    names = [step.name for step in gpu_services(machine, with_cards(live, ADA))]
    assert names == ["nvidia modules", "unit nvidia-persistenced.service"]


# --- the legacy driver ---------------------------------------------------------------------------------------------------


@pytest.fixture
def legacy(machine: Machine) -> Machine:
    return wishing(machine, legacy_commit=COMMIT)


@pytest.mark.parametrize("system_name", ["live", "installed"])
def test_golden_steps_of_a_legacy_machine(legacy: Machine, live: Facts, system_name: str) -> None:
    facts = with_cards(live, PASCAL, TURING, installed=system_name == "installed")
    steps = [*other_drivers(legacy, facts), *gpu(legacy, facts), *gpu_services(legacy, facts)]
    golden = GOLDEN / f"legacy-gpu-{system_name}.txt"
    rendered = render(steps)
    if "UPDATE_GOLDEN" in os.environ:  # then read the difference, line by line
        golden.write_text(rendered)
    assert rendered == golden.read_text()
    for step in steps:
        for script in (step.probe, step.script, step.then):
            checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
            assert checked.returncode == 0, checked.stderr + script


def test_nothing_of_the_aur_is_asked_of_pacstrap_and_nothing_of_nvidias_of_the_repositories(
    legacy: Machine, live: Facts
) -> None:
    for there in (False, True):
        facts = with_cards(live, PASCAL, installed=there)
        names = {name for step in gpu(legacy, facts) for name in step.packages}
        assert {"dkms", "linux-lts-headers"} <= names
        assert not any("nvidia" in name for name in names)
        assert ({"git", "base-devel"} <= names) == there
    assert not list(gpu_services(legacy, with_cards(live, PASCAL)))
    order = [step.name for step in gpu_services(legacy, with_cards(live, PASCAL, installed=True))]
    assert order[-3:] == ["driver nvidia-580xx", "nvidia modules", "unit nvidia-persistenced.service"]


@pytest.fixture
def aur(tmp_path: Path) -> Path:
    """What the AUR serves: a package's history of three commits."""
    folder = tmp_path / "served"
    folder.mkdir()
    git(folder, "init", "--quiet")
    for number in (1, 2, 3):
        (folder / "PKGBUILD").write_text(f"pkgver={number}\n")
        git(folder, "add", "PKGBUILD")
        git(folder, "commit", "--quiet", "--message", str(number))
    return folder


def fetch(aur: Path, commit: str) -> subprocess.CompletedProcess[str]:
    return bash(fetch_source(commit, f"file://{aur}", str(aur.parent / "source"), "gpu.legacy_commit"))


def test_exactly_the_commit_that_was_read_is_fetched(aur: Path) -> None:
    source = aur.parent / "source"
    for revision, version in (("HEAD~1", "2"), ("HEAD", "3"), ("HEAD~2", "1")):
        commit = git(aur, "rev-parse", revision)
        assert fetch(aur, commit).returncode == 0
        assert (source / "PKGBUILD").read_text() == f"pkgver={version}\n"
        assert git(source, "rev-parse", "HEAD") == commit


def test_a_commit_that_is_not_in_the_history_is_refused(aur: Path) -> None:
    git(aur, "checkout", "--quiet", "-b", "aside", "HEAD~1")
    git(aur, "commit", "--quiet", "--allow-empty", "--message", "aside")
    aside = git(aur, "rev-parse", "HEAD")
    git(aur, "checkout", "--quiet", "master")
    for commit in (COMMIT, aside):
        refused = fetch(aur, commit)
        assert refused.returncode == 1
        assert f"refused: commit {commit} is not in the history" in refused.stdout
        assert git(aur, "rev-parse", "HEAD") in refused.stdout
        assert not (aur.parent / "source" / "PKGBUILD").exists()


def test_a_branch_that_was_moved_away_from_the_commit_is_refused(aur: Path) -> None:
    commit = git(aur, "rev-parse", "HEAD")
    git(aur, "reset", "--quiet", "--hard", "HEAD~2")
    (aur / "PKGBUILD").write_text("pkgver=evil\n")
    git(aur, "commit", "--quiet", "--all", "--message", "another history")
    refused = fetch(aur, commit)
    assert refused.returncode == 1
    assert "refused: commit" in refused.stdout


def test_a_checkout_that_was_tampered_with_is_made_anew(aur: Path) -> None:
    commit, source = git(aur, "rev-parse", "HEAD"), aur.parent / "source"
    assert fetch(aur, commit).returncode == 0
    step = list(legacy_driver(commit))[2]
    probe = replace(step, probe=step.probe.replace(SOURCE, str(source)))
    assert probe.is_done(probed(probe))
    (source / "PKGBUILD").write_text("pkgver=evil\n")
    assert not probe.is_done(probed(probe))
    (source / "PKGBUILD").write_text("pkgver=3\n")
    (source / "extra.install").write_text("post_install() { evil; }\n")
    assert not probe.is_done(probed(probe))
    hook = source / ".git/hooks/post-checkout"
    hook.write_text("#!/bin/sh\necho evil >> PKGBUILD\n")
    hook.chmod(0o755)
    assert fetch(aur, commit).returncode == 0
    assert probe.is_done(probed(probe))
    other = list(legacy_driver(COMMIT))[2]  # another commit is wished for
    assert not other.is_done(probed(replace(other, probe=other.probe.replace(SOURCE, str(source)))))


def test_a_server_that_is_no_repository(aur: Path) -> None:
    refused = bash(fetch_source(COMMIT, f"file://{aur}-not", str(aur.parent / "source"), "gpu.legacy_commit"))
    assert refused.returncode == 1
    assert "does not answer as a git repository" in refused.stdout


def test_root_builds_nothing() -> None:
    script = build_packages()
    assert "runuser --user metal-aur" in script
    assert script.index("runuser") < script.index("makepkg --force")
    assert not re.search(r"^makepkg", script, re.MULTILINE)
    assert set(LEGACY) == {"nvidia-580xx-dkms", "nvidia-580xx-utils"}


def test_the_whole_plan_of_a_legacy_machine(legacy: Machine, live: Facts) -> None:
    for facts in (live, installed(legacy, live)):
        steps = system(legacy, replace(facts, gpus=cards(PASCAL, TURING)), NOW)
        names = [step.name for step in steps]
        (packages,) = [step for step in steps if step.packages]
        assert {"linux-lts", "linux-lts-headers", "dkms"} <= set(packages.packages)
        if facts.system == "installed":
            assert names.index(packages.name) < names.index("source of nvidia-580xx")
            assert names.index("nvidia modules") < names.index("python environment")
        else:
            assert not any("580xx" in name for name in names)
