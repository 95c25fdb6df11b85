"""What an installed machine has and its file does not name: shown by `plan`, and never changed by anything here.

That which the file does name is a Step, and the difference of a Step from what is there is shown by `render_plan`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from shlex import join, quote

from provision.errors import ProvisionError
from provision.facts import Facts, split_sections
from provision.machine import Machine
from provision.snapshot import BEFORE, ROLLED_BACK, UPDATING
from provision.steps import Step
from provision.system.aur import BUILDER
from provision.system.gpu import driver_of
from provision.system.legacy import LEGACY

# `wanted`: words of bash. What provides a wanted name is wanted; of groups, what was in them at the last upgrade.
# Our own transactions are known again in pacman's log by --noprogressbar, which nobody types.
LOOK = r"""
section() { printf '\n@%s\n' "$1"; }
section by_hand
comm -13 <({ pacman -Qq $wanted; [[ -z $groups ]] || pacman -Sgq $groups; } 2> /dev/null | sort -u) <(pacman -Qqe | sort)
section once_wanted
sed -n "s/.*\[PACMAN\] Running '\(.*--noprogressbar.*\)'.*/\1/p" /var/log/pacman.log 2> /dev/null | tr -s ' ' '\n' | grep -v '^-' | sort -u
section unneeded; pacman -Qqdt
section foreign; pacman -Qqm
section leftover_files
find /etc -xdev \( -name '*.pacnew' -o -name '*.pacsave' -o -name '*.pacorig' \) 2> /dev/null | sort
section failed; systemctl list-units --failed --plain --no-legend 2> /dev/null | awk '{ print $1 }'
section enabled
enabled=$(systemctl list-unit-files --state=enabled --plain --no-legend 2> /dev/null | awk '$3 == "disabled" { print $1 }')
# some bring others with them
also=$(systemctl cat $enabled 2> /dev/null | sed -n 's/^Also=//p' | tr -s ' ' '\n')
comm -23 <(sort -u <<< "$enabled") <(sort -u <<< "$also")
section accounts; awk -F: '$3 >= 1000 && $3 < 60000 { print $1 }' /etc/passwd
section upgraded; sed -n 's/^\[\([0-9-]*\)T.*starting full system upgrade$/\1/p' /var/log/pacman.log 2> /dev/null | tail -n 1
section rolled_back; find /.snapshots -maxdepth 1 -name "$rolled_back-*" 2> /dev/null | sort
section before; sed -n 's/^title //p' "/boot/loader/entries/$before.conf" 2> /dev/null
section updating; cat "$updating" 2> /dev/null
section end
"""


@dataclass(frozen=True)
class Extras:
    """Names, sorted. What is `no_longer_wanted` was installed by us, for a machine file of then."""

    by_hand: tuple[str, ...]  # packages
    no_longer_wanted: tuple[str, ...]  # packages
    unneeded: tuple[str, ...]  # packages that came as a dependency, of which nothing is left
    foreign: tuple[str, ...]  # packages of no repository, without those of aur.*
    leftover_files: tuple[str, ...]  # .pacnew and the like
    failed: tuple[str, ...]  # units
    enabled: tuple[str, ...]  # units that somebody enabled
    accounts: tuple[str, ...]
    rolled_back: tuple[str, ...]  # systems that were taken back
    upgraded: str  # day of the last full upgrade, as 2026-11-23; "" where pacman's log does not say
    before: str  # what a rollback goes back to: title of its boot entry; "" where there is none
    updating: str  # day of an update that was not finished


def wanted_packages(machine: Machine, facts: Facts, steps: Sequence[Step]) -> tuple[str, ...]:
    names = [name for step in steps for name in step.packages]
    names += from_the_aur(machine, facts)
    return tuple(dict.fromkeys(names))


def from_the_aur(machine: Machine, facts: Facts) -> list[str]:
    names = [name for base, wanted in machine.aur.items() for name in wanted.packages or (base,)]
    driver = driver_of(machine, facts)
    return [*names, *(LEGACY if driver and driver.legacy else ())]


def render_look(machine: Machine, facts: Facts, steps: Sequence[Step]) -> str:
    """The script whose output `parse_extras` reads."""
    wanted = join(wanted_packages(machine, facts, steps))
    values = f"wanted={quote(wanted)} groups={quote(join(machine.system.groups))} before={BEFORE} rolled_back={ROLLED_BACK} updating={UPDATING}\n"
    return f"set +eo pipefail\n{values}{LOOK}"


def parse_extras(machine: Machine, facts: Facts, steps: Sequence[Step], text: str) -> Extras:
    seen = split_sections(text)
    if "end" not in seen:
        raise ProvisionError("The answer about what else is on the machine is incomplete.", "Run it again.")
    words = {word for step in steps for word in re.findall(r"[\w@.:-]+", step.script)}
    once = set(seen["once_wanted"])
    known = {"nobody", machine.user.name, *machine.users, BUILDER}
    return Extras(
        by_hand=tuple(name for name in seen["by_hand"] if name not in once),
        no_longer_wanted=tuple(name for name in seen["by_hand"] if name in once),
        unneeded=tuple(seen["unneeded"]),
        foreign=tuple(sorted({*seen["foreign"]} - {*from_the_aur(machine, facts)})),
        leftover_files=tuple(seen["leftover_files"]),
        failed=tuple(seen["failed"]),
        enabled=tuple(
            unit
            for unit in seen["enabled"]
            if words.isdisjoint({unit, unit.rpartition(".")[0]}) and not unit.startswith("metal-")
        ),
        accounts=tuple(name for name in seen["accounts"] if name not in known),
        rolled_back=tuple(seen["rolled_back"]),
        upgraded="".join(seen["upgraded"]),
        before="".join(seen["before"]),
        updating="".join(seen["updating"]),
    )


def render_extras(extras: Extras) -> str:
    """For a person; "" where there is nothing to say."""
    found = list(describe(extras))
    lines = ["In no machine file (only shown, nothing of it is changed):"] if found else []
    for what, names, remedy in found:
        lines += [f"  {what}: {' '.join(names)}", f"      {remedy}"]
    if extras.failed:
        lines += [f"Failed units: {' '.join(extras.failed)}", f"      systemctl status {extras.failed[0]}"]
    if extras.upgraded:
        lines.append(f"Packages were last upgraded on {extras.upgraded}.")
    if extras.before:
        lines.append(f"What `rollback` goes back to: {extras.before}.")
    if extras.updating:
        lines.append(f"The update of {extras.updating} was not finished: `update` goes on with it.")
    return "\n".join(lines)


def describe(extras: Extras) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(what, names, what a person may do about them), where there are any."""
    every = (
        (
            "packages that the machine file named once",
            extras.no_longer_wanted,
            "to remove: sudo pacman -Rns NAMES",
        ),
        ("packages installed by hand", extras.by_hand, "to keep: name them in system.packages"),
        ("packages that nothing needs", extras.unneeded, "to remove: sudo pacman -Rns $(pacman -Qqdt)"),
        (
            "packages of no repository",
            extras.foreign,
            "no upgrade reaches them: build them again, or remove them",
        ),
        (
            "files of upgrades beside changed ones",
            extras.leftover_files,
            "compare, merge, remove: pacdiff (of pacman-contrib)",
        ),
        ("units enabled by hand", extras.enabled, "to keep: name them in [units]"),
        (
            "systems that were taken back",
            extras.rolled_back,
            "what you need of it is in there; to remove: sudo btrfs subvolume delete FOLDER",
        ),
        ("accounts", extras.accounts, "to keep: name them in [users.NAME]; to remove: sudo userdel NAME"),
    )
    return ((what, names, remedy) for what, names, remedy in every if names)
