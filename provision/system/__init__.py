"""The whole system, a concern a function; what follows is the order in which it is built.

To add a concern of your own, write a function `(Machine, Facts) -> Iterator[Step]` and put it into the list.
"""

from collections.abc import Callable, Iterator

from provision.errors import ProvisionError
from provision.facts import Facts
from provision.machine import Machine
from provision.steps import Step, check_unique, merge_packages
from provision.system.base import (
    base,
    bootstrap,
    check_machine,
    extra_packages,
    identity,
    language_and_time,
    pacman,
    users,
)
from provision.system.boot import boot, initramfs
from provision.system.disk import disk, find_disk, fstab, layout
from provision.system.gpu import gpu, gpu_services
from provision.system.live import clock, live
from provision.system.network import network, sshd
from provision.system.python import python

Concern = Callable[[Machine, Facts], Iterator[Step]]

CONCERNS: tuple[Concern, ...] = (
    disk,
    base,
    gpu,
    extra_packages,
    pacman,
    fstab,
    identity,
    language_and_time,
    users,
    network,
    sshd,
    initramfs,
    boot,
    gpu_services,
    python,
)


def system(machine: Machine, facts: Facts, now_s: int) -> list[Step]:
    """All Steps for the system that the host is in now: the live ISO, or the installation.

    `now_s` is this computer's clock when the facts were gathered, in seconds since the epoch. Raises
    ProvisionError for what must be refused before anything is changed.
    """
    check_machine(machine, facts)
    find_disk(machine, facts)
    if facts.system == "installed" and facts.root_partition != layout(machine).root_uuid:
        raise ProvisionError(
            f"{facts.hostname} runs from partition {facts.root_partition or '(none)'}, not from the root that we made on the "
            f"disk with serial {machine.disk.serial}.",
            "Was disk.serial changed after the installation? Put the old one back, or install anew from the ISO.",
        )
    steps = [*clock(machine, facts, now_s), *live(machine, facts)]
    for concern in CONCERNS:
        steps.extend(concern(machine, facts))
    steps = merge_packages(steps)
    if facts.system == "live":
        steps = [bootstrap(step, machine) if step.packages else step for step in steps]
    check_unique(steps)
    return steps
