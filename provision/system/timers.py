"""What is done once a week: unused blocks told to the disks, old downloads removed, mirrors chosen."""

from collections.abc import Iterator
from shlex import quote

from provision.facts import Facts
from provision.machine import Machine
from provision.steps import File, Packages, Step, Unit


def timers(machine: Machine, facts: Facts) -> Iterator[Step]:
    if facts.system != "installed":
        return
    wanted = machine.timers
    if wanted.fstrim:
        yield Unit("fstrim.timer", why="tells disks what is free")
    if wanted.paccache:
        yield Packages("pacman-contrib", why="paccache removes old downloads")
        yield Unit("paccache.timer", why="keeps the last three versions of a package")
    if wanted.reflector:
        countries = machine.mirror.countries
        yield Packages("reflector", why="chooses mirrors")
        yield File(
            "/etc/xdg/reflector/reflector.conf",
            "--save /etc/pacman.d/mirrorlist\n--protocol https\n--latest 20\n--sort rate\n--number 10\n"
            + (f"--country {quote(','.join(countries))}\n" if countries else ""),
            why="which mirrors it chooses",
        )
        yield Unit("reflector.timer", why="chooses mirrors once a week")
