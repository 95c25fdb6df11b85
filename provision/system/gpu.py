"""Driver, kernel headers and daemon for the NVIDIA cards that the probe saw."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from shlex import join

from provision.errors import ProvisionError
from provision.facts import Facts, GpuSeen
from provision.machine import Machine
from provision.steps import BASE_COMPLETE, File, Packages, Script, Step
from provision.system.legacy import AUR_URL, LEGACY, legacy_driver

# First PCI device id of a family, and its name. The open kernel modules support Turing and newer:
# https://github.com/NVIDIA/open-gpu-kernel-modules (id table in its README); older families by CachyOS/chwd's id lists.
FAMILIES: tuple[tuple[int, str], ...] = (
    (0x2900, "Blackwell or newer"),
    (0x2600, "Ada"),
    (0x2400, "Ampere"),
    (0x2300, "Hopper"),
    (0x2200, "Ampere"),
    (0x2100, "Turing"),
    (0x2000, "Ampere"),
    (0x1E00, "Turing"),
    (0x1340, "Maxwell, Pascal or Volta"),
    (0x0000, "Kepler or older"),
)
# Older than OPEN_FROM: only NVIDIA's proprietary modules, whose last branch is 580. From ONLY_OPEN_FROM on: only the
# open ones, which drive nothing older than Turing. Between the two: either.
ONLY_OPEN_FROM, OPEN_FROM, LEGACY_FROM = 0x2900, 0x1E00, 0x1340

# Packages of one kernel's modules; for any other kernel, and for several, DKMS builds them.
# (Not nvidia-lts-open, as https://archlinux.org/news/nvidia-590-driver-drops-pascal-support-main-packages-switch-to-open-kernel-modules/ has it.)
BUILT_FOR: dict[tuple[str, ...], str] = {("linux",): "nvidia-open", ("linux-lts",): "nvidia-open-lts"}
FLAVOURS = (*BUILT_FOR.values(), "nvidia-open-dkms")
DAEMON = "nvidia-persistenced.service"


@dataclass(frozen=True)
class Driver:
    """Packages of Arch's repositories; with `legacy` those that the driver from the AUR is built and run with."""

    packages: tuple[str, ...]
    reason: str
    legacy: bool = False

    @property
    def built_here(self) -> bool:
        """True where DKMS builds the modules."""
        return any(name.endswith("dkms") for name in self.packages)


def family(device: int) -> str:
    return next(name for first, name in FAMILIES if device >= first)


def describe(gpus: Sequence[GpuSeen]) -> str:
    return ", ".join(f"{gpu.slot} (10de:{gpu.device:04x}, {family(gpu.device)})" for gpu in gpus)


def needs_legacy(gpus: Sequence[GpuSeen]) -> bool:
    """True where a card is older than what CUDA 13 and NVIDIA's present drivers know."""
    return any(gpu.device < OPEN_FROM for gpu in gpus)


def choose_driver(
    wanted: str, gpus: Sequence[GpuSeen], kernels: Sequence[str], legacy_commit: str = ""
) -> Driver | None:
    """The driver for these cards and all these kernels; None where none is to be installed.

    `wanted` is gpu.driver of the machine file: auto, open or none; `legacy_commit` its gpu.legacy_commit.
    Raises ProvisionError for cards that no driver drives, or no driver that the person has agreed to.
    """
    if wanted == "none" or (wanted == "auto" and not gpus):
        return None
    headers = tuple(f"{kernel}-headers" for kernel in dict.fromkeys(kernels))
    seen = (
        ", ".join(f"{gpu.slot} is 10de:{gpu.device:04x} ({family(gpu.device)})" for gpu in gpus)
        or "for a card to come"
    )
    built_for = " and ".join(dict.fromkeys(kernels))
    if needs_legacy(gpus):
        check_legacy(wanted, gpus, legacy_commit)
        reason = f"{seen}: NVIDIA's 580xx branch, built by DKMS for {built_for}"
        return Driver(("dkms", *headers), reason, legacy=True)
    one = BUILT_FOR.get(tuple(dict.fromkeys(kernels)))
    modules = (one,) if one else ("nvidia-open-dkms", *headers)
    return Driver((*modules, "nvidia-utils"), f"{seen}: open kernel modules, built for {built_for}")


WITHOUT = 'To install without a GPU driver, set in the machine file: [gpu] driver = "none"'


def check_legacy(wanted: str, gpus: Sequence[GpuSeen], legacy_commit: str) -> None:
    """Raise ProvisionError unless the 580xx branch drives all these cards and the person has read its package."""
    if ancient := [gpu for gpu in gpus if gpu.device < LEGACY_FROM]:
        raise ProvisionError(
            f"No package of Arch's repositories drives {describe(ancient)}: it is too old for any driver that current kernels build.",
            WITHOUT,
        )
    old = [gpu for gpu in gpus if gpu.device < OPEN_FROM]
    if new := [gpu for gpu in gpus if gpu.device >= ONLY_OPEN_FROM]:
        raise ProvisionError(
            f"No one driver drives both {describe(old)} and {describe(new)}: the old needs NVIDIA's proprietary modules, "
            "whose last branch is 580; the new has only open ones; and a kernel loads one of the two.",
            f"Take one kind out of the machine. {WITHOUT}",
        )
    if wanted == "open":
        raise ProvisionError(
            f'gpu.driver is "open", and the open kernel modules do not drive {describe(old)}: '
            "it needs NVIDIA's 580xx legacy branch.",
            'Set in the machine file: [gpu] driver = "auto"',
        )
    if not legacy_commit:
        folder = AUR_URL.rpartition("/")[2].removesuffix(".git")
        raise ProvisionError(
            f"No package of Arch's repositories drives {describe(old)}: it needs NVIDIA's 580xx legacy branch, which Arch "
            "has only in the AUR. Anybody may publish there, so nothing of it is built that nobody has read.",
            f"Read what would be built:  git clone {AUR_URL} && cd {folder} && more PKGBUILD *.install *.patch\n"
            'If you trust it, name this very commit in the machine file:  [gpu] legacy_commit = "…"  (git rev-parse HEAD)\n'
            + WITHOUT,
        )


def driver_of(machine: Machine, facts: Facts) -> Driver | None:
    driver = choose_driver(machine.gpu.driver, facts.gpus, machine.system.kernels, machine.gpu.legacy_commit)
    if driver and driver.legacy and machine.gpu.cuda:
        raise ProvisionError(
            f"gpu.cuda is true, and Arch's cuda is version 13, which knows no {family(LEGACY_FROM)}; "
            "beside the 580xx driver it cannot be installed either.",
            "Set in the machine file: [gpu] cuda = false (PyTorch brings its own CUDA)",
        )
    return driver


def other_drivers(machine: Machine, facts: Facts) -> Iterator[Step]:
    """Before the packages: what conflicts with them goes, for pacman asks a person and takes --noconfirm for a no."""
    driver = driver_of(machine, facts)
    if driver is None:
        return
    every = {*FLAVOURS, "nvidia-utils", *LEGACY, "opencl-nvidia-580xx"}
    kept = {*LEGACY, "opencl-nvidia-580xx"} if driver.legacy else set(driver.packages)
    unwanted = join(sorted(every - kept))
    # Not `pacman -Q NAME`: it also finds what provides NAME, as nvidia-580xx-utils does nvidia-utils.
    installed = f"comm -12 <(at pacman -Qq | sort) <(printf '%s\\n' {unwanted})"
    step = Script(
        "no other NVIDIA driver",
        why="of another kernel or branch, which conflicts with the one wanted now",
        probe=f'if [[ ! $root || -e "$root"{BASE_COMPLETE} ]]; then {installed}; fi',  # what is unfinished is emptied
        expect="",
        script=f"in_target pacman -Rdd --noconfirm --noprogressbar $({installed})",
    )
    yield replace(step, disturbs_runs=True)


def gpu(machine: Machine, facts: Facts) -> Iterator[Step]:
    driver = driver_of(machine, facts)
    if driver is None:
        return
    yield Packages(*driver.packages, why=driver.reason)
    if driver.legacy:
        # nvidia-580xx-utils says the same, and comes after the first boot: by then nouveau would hold the cards.
        yield File(
            "/etc/modprobe.d/10-metal-nvidia.conf",
            "blacklist nouveau\nblacklist nova_core\nblacklist nova_drm\n",
            why="leaves the cards to NVIDIA's driver",
        )
        if facts.system == "installed":
            yield Packages("base-devel", "git", why="build the driver from the AUR")
    if machine.gpu.cuda:
        yield Packages("cuda", why="gpu.cuda: nvcc, for who compiles")
    if machine.gpu.container_toolkit:
        yield Packages("nvidia-container-toolkit", why="gpu.container_toolkit: GPUs inside of containers")


def gpu_services(machine: Machine, facts: Facts) -> Iterator[Step]:
    """After the packages: the driver from the AUR, the modules of every kernel, the daemon."""
    driver = driver_of(machine, facts)
    if driver is None or (driver.legacy and facts.system != "installed"):
        return
    if driver.legacy:
        yield from legacy_driver(machine.gpu.legacy_commit)
    yield modules_exist(machine.system.kernels, built_here=driver.built_here)
    if facts.gpus:  # without a card it fails
        yield persistenced()


def modules_exist(kernels: Sequence[str], *, built_here: bool) -> Step:
    """DKMS fails without failing pacman; and a mirror in the middle of an update may hold modules for another kernel."""
    missing = f"""missing() {{  # kernels without a module, by version; by name where one is not there at all
  for kernel in {join(dict.fromkeys(kernels))}; do
    version=
    for base in "$root"/usr/lib/modules/*/pkgbase; do
      [[ -e $base && $(<"$base") == "$kernel" ]] || continue
      version=${{base%/pkgbase}}
      version=${{version##*/}}
      at modinfo -k "$version" nvidia > /dev/null 2>&1 || echo "$version"
    done
    [[ $version ]] || echo "$kernel"
  done
}}
"""
    if built_here:
        mend = """for version in $(missing); do in_target dkms autoinstall --kernelver "$version" || true; done
[[ -z $(missing) ]] || {
  echo "DKMS built no nvidia module for: $(missing | xargs)"
  echo "dkms status:"; in_target dkms status
  for log in "$root"/var/lib/dkms/nvidia/*/build/make.log; do
    if [[ -e $log ]]; then echo "the end of $log:"; tail -n 15 "$log"; fi
  done
  echo "If the kernel is too new for this driver: system.kernels = [\\"linux-lts\\"]"
  exit 1
}"""
    else:
        mend = """[[ -z $(missing) ]] || {
  echo "the installed driver has no module for: $(missing | xargs): the mirror is between two updates; try again later"
  exit 1
}"""
    return Script(
        "nvidia modules",
        why="for every kernel that may boot",
        probe=missing + "missing",
        expect="",
        script=missing + mend,
    )


def persistenced() -> Step:
    """Enabled; and running, unless the driver that is installed will be loaded by the next boot only."""
    loaded = (
        "[[ ! $root && -e /sys/module/nvidia/version"
        " && $(</sys/module/nvidia/version) == $(modinfo --field version nvidia 2> /dev/null) ]]"
    )
    return Script(
        f"unit {DAEMON}",
        why="keeps the cards initialised without a display",
        probe=f'systemctl --root="${{root:-/}}" is-enabled {DAEMON} || true\n'
        f"if {loaded}; then systemctl is-active {DAEMON} || true; else echo active; fi",
        expect="enabled\nactive",
        script=f'systemctl --root="${{root:-/}}" enable {DAEMON}\n'
        "[[ $root ]] || { systemctl daemon-reload; modprobe --all nvidia nvidia-uvm"
        " || echo 'the driver will be loaded by the next boot'; }\n"
        f"if {loaded}; then systemctl start {DAEMON}; fi",
    )
