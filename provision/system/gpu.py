"""Driver, kernel headers and daemon for the NVIDIA cards that the probe saw."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from provision.errors import ProvisionError
from provision.facts import Facts, GpuSeen
from provision.machine import Machine
from provision.steps import Packages, Script, Step, Unit

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
OPEN_FROM, LEGACY_FROM = 0x1E00, 0x1340


@dataclass(frozen=True)
class Driver:
    packages: tuple[str, ...]
    reason: str


def family(device: int) -> str:
    return next(name for first, name in FAMILIES if device >= first)


def choose_driver(wanted: str, gpus: Sequence[GpuSeen], kernel: str) -> Driver | None:
    """The driver packages of Arch's official repositories for these cards; None where none is to be installed.

    `wanted` is gpu.driver of the machine file: auto, open or none. Raises ProvisionError for a card that no
    package of those repositories drives.
    """
    if wanted == "none" or (wanted == "auto" and not gpus):
        return None
    unsupported = [gpu for gpu in gpus if gpu.device < OPEN_FROM]
    if unsupported:
        cards = ", ".join(f"{gpu.slot} (10de:{gpu.device:04x}, {family(gpu.device)})" for gpu in unsupported)
        branch = (
            "needs NVIDIA's 580xx legacy branch, which Arch has only in the AUR"
            if all(gpu.device >= LEGACY_FROM for gpu in unsupported)
            else "is too old for any driver that current kernels build"
        )
        raise ProvisionError(
            f"No package of Arch's repositories drives {cards}: it {branch}.",
            'To install without a GPU driver, set in the machine file: [gpu] driver = "none"',
        )
    packages = {"linux": ("nvidia-open",), "linux-lts": ("nvidia-open-lts",)}.get(
        kernel, ("nvidia-open-dkms", f"{kernel}-headers")
    )
    seen = (
        ", ".join(f"{gpu.slot} is 10de:{gpu.device:04x} ({family(gpu.device)})" for gpu in gpus)
        or "for a card to come"
    )
    return Driver((*packages, "nvidia-utils"), f"{seen}: open kernel modules, built for {kernel}")


def gpu(machine: Machine, facts: Facts) -> Iterator[Step]:
    driver = choose_driver(machine.gpu.driver, facts.gpus, machine.system.kernels[0])
    if driver is None:
        return
    yield Packages(*driver.packages, why=driver.reason)
    if machine.gpu.cuda:
        yield Packages("cuda", why="gpu.cuda: nvcc, for who compiles")
    if machine.gpu.container_toolkit:
        yield Packages("nvidia-container-toolkit", why="gpu.container_toolkit: GPUs inside of containers")


def gpu_services(machine: Machine, facts: Facts) -> Iterator[Step]:
    """After the packages: the daemon, and the check that DKMS did build (a failed build only warns in pacman)."""
    driver = choose_driver(machine.gpu.driver, facts.gpus, machine.system.kernels[0])
    if driver is None:
        return
    if facts.gpus:  # without a card it fails
        yield Unit("nvidia-persistenced.service", why="keeps the cards initialised without a display")
    check = 'for modules in "$root"/usr/lib/modules/*/; do at modinfo -k "$(basename "$modules")" nvidia > /dev/null || exit 1; done'
    yield Script(
        "nvidia module exists",
        why="for every kernel that may boot",
        probe=f"{check}; echo yes",
        script=f"{check}",
    )
