"""The whole system, a concern a function; what follows is the order in which it is built.

To add a concern of your own, write a function `(Machine, Facts) -> Iterator[Step]` and put it into the list.
"""

from collections.abc import Callable, Iterator, Sequence

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
from provision.system.crypt import encryption
from provision.system.data import data, mount_data
from provision.system.desktop import desktop
from provision.system.disk import disk, find_disks, fstab
from provision.system.firewall import firewall, hardening
from provision.system.gpu import gpu, gpu_services, other_drivers
from provision.system.layout import layout
from provision.system.live import clock, live
from provision.system.mirror import mirror
from provision.system.network import network, sshd
from provision.system.own import (
    own_aur,
    own_aur_tools,
    own_files,
    own_groups,
    own_lines,
    own_packages,
    own_sysctl,
    own_units,
    own_users,
)
from provision.system.python import own_environments, python
from provision.system.swap import swap
from provision.system.timers import timers

Concern = Callable[[Machine, Facts], Iterator[Step]]

CONCERNS: tuple[Concern, ...] = (
    disk,
    other_drivers,
    base,
    gpu,
    extra_packages,
    own_packages,
    own_aur_tools,
    pacman,
    encryption,
    swap,
    data,
    fstab,
    mount_data,
    identity,
    language_and_time,
    users,
    network,
    sshd,
    initramfs,
    boot,
    mirror,
    gpu_services,
    python,
    timers,
    firewall,
    hardening,
    desktop,
    # What the person adds, last: what is wrong in it leaves a machine that runs.
    own_groups,
    own_aur,
    own_environments,
    own_users,
    own_files,
    own_lines,
    own_sysctl,
    own_units,
)


def check_root(machine: Machine, facts: Facts) -> None:
    """What is done to a snapshot would be lost."""
    if facts.subvolume.startswith("/@snapshots/"):
        raise ProvisionError(
            f"{facts.hostname} runs the snapshot {facts.subvolume}, and not its system: an update was cut off, did not "
            "come up, or was taken back.",
            f"To make the system from before the update its only one: fab -H {machine.name} rollback",
        )


def check_layout(machine: Machine, facts: Facts) -> None:
    """An installed system's disks cannot be laid out anew: refuse a machine file that asks for it."""
    check_root(machine, facts)
    remedy = "Were [disk] settings changed after the installation? Put the old ones back, or install anew from the ISO."
    if not layout(machine).roots & set(facts.root_partitions):
        raise ProvisionError(
            f"{facts.hostname} runs from partition {' '.join(facts.root_partitions) or '(none)'}, not from the root that we made "
            f"on the disk with serial {machine.disk.serial}.",
            remedy,
        )
    there = {part.uuid for disk in facts.disks for part in disk.partitions}
    if missing := [part for part in layout(machine).parts if part.uuid not in there]:
        names = ", ".join(f"{part.name} on {part.serial}" for part in missing)
        raise ProvisionError(
            f"{facts.hostname} lacks partitions that the machine file asks for: {names}.", remedy
        )


def check_places(steps: Sequence[Step]) -> None:
    """One path in two Steps of different kinds: each would undo the other for ever."""
    seen: dict[str, str] = {}
    for step in steps:
        kind, _, rest = step.name.partition(" ")
        place = rest.rpartition(" of ")[2] if kind == "line" else rest
        if kind not in ("file", "link", "directory", "line"):
            continue
        before = seen.setdefault(place, kind)
        if before != kind:
            raise ProvisionError(
                f"{place} would be a {before} and a {kind}: two Steps that would undo each other.",
                "Take one of them out of the machine file; what the system itself makes cannot be replaced there.",
            )


def system(machine: Machine, facts: Facts, now_s: int) -> list[Step]:
    """All Steps for the system that the host is in now: the live ISO, or the installation.

    `now_s` is this computer's clock when the facts were gathered, in seconds since the epoch. Raises
    ProvisionError for what must be refused before anything is changed.
    """
    check_machine(machine, facts)
    find_disks(machine, facts)
    if facts.system == "installed":
        check_layout(machine, facts)
    steps = [*clock(machine, facts, now_s), *live(machine, facts)]
    for concern in CONCERNS:
        steps.extend(concern(machine, facts))
    steps = merge_packages(steps)
    if facts.system == "live":
        steps = [bootstrap(step, machine) if step.packages else step for step in steps]
    check_unique(steps)
    check_places(steps)
    return steps
