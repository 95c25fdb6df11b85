"""What a person adds to their machines by the machine file alone: users, files, links, lines, units, kernel settings.

On the installed system only, and last: what is wrong in it leaves a machine that runs and that can be reached.
"""

from collections.abc import Iterator

from provision.facts import Facts
from provision.kinds import CheckedFile, Groups, Line, ParentFolders, Sysctl, UnitState, check_for
from provision.machine import Machine, template_values
from provision.own import absolute, home_of, parents
from provision.steps import Directory, File, Link, Packages, Password, Step, User
from provision.system.aur import builder, from_aur
from provision.system.gpu import driver_of
from provision.system.scale import screen_values
from provision.templates import fill

# What must hear of a changed file, by where it lies.
RELOADS = {
    "/etc/systemd/system/": "systemctl daemon-reload",
    "/etc/udev/rules.d/": "udevadm control --reload",
    "/etc/ssh/sshd_config.d/": "systemctl try-reload-or-restart sshd.service",
    "/etc/ssh/sshd_config": "systemctl try-reload-or-restart sshd.service",
    "/etc/tmpfiles.d/": "systemd-tmpfiles --create",
}


def own_packages(machine: Machine, facts: Facts) -> Iterator[Step]:
    """The person's lists and groups of packages."""
    if facts.system != "installed":
        return
    for name, packages in machine.packages.items():
        if packages:
            yield Packages(*packages, why=f"packages.{name} of the machine file")


def own_aur_tools(machine: Machine, facts: Facts) -> Iterator[Step]:
    """What packages of the AUR are built with, in the one transaction of all packages."""
    if facts.system == "installed" and machine.aur:
        yield Packages("base-devel", "git", why="build packages from the AUR")


def own_aur(machine: Machine, facts: Facts) -> Iterator[Step]:
    """Packages of the AUR at the commits that a person has read, in the order of the machine file."""
    if facts.system != "installed" or not machine.aur:
        return
    driver = driver_of(machine, facts)
    if not (driver and driver.legacy):  # which has the same builder
        yield from builder("builds packages from the AUR, so that root does not")
    for base, wanted in machine.aur.items():
        yield from from_aur(base, wanted.commit, wanted.packages or (base,))


def own_groups(machine: Machine, facts: Facts) -> Iterator[Step]:
    if facts.system == "installed" and machine.system.groups:
        yield Groups(*machine.system.groups, why="system.groups of the machine file")


def own_users(machine: Machine, facts: Facts) -> Iterator[Step]:
    """More people. Who is no longer in the machine file stays on the machine."""
    if facts.system != "installed":
        return
    for name, wanted in machine.users.items():
        home, own = home_of(name), f"{name}:{name}"
        why = f"users.{name} of the machine file"
        yield User(name, shell=wanted.shell, groups=wanted.groups, why=why)
        if wanted.password:
            yield Password(name, wanted.password, why=why)
        if wanted.authorized_keys:
            yield Directory(
                home, mode=0o700, owner=own, why="sshd refuses keys in a home that others may write to"
            )
            yield Directory(
                f"{home}/.ssh",
                mode=0o700,
                owner=own,
                why="sshd refuses keys in a folder that others may write to",
            )
            yield File(
                f"{home}/.ssh/authorized_keys",
                "".join(f"{key}\n" for key in wanted.authorized_keys),
                mode=0o600,
                owner=own,
                why="the keys that log in",
            )


def owner_of(path: str, wanted: str, machine: Machine) -> str:
    """user:group of what lies there: as wanted, else whose home it is in, else root's."""
    if wanted:
        return wanted
    for user in (machine.user.name, *machine.users):
        if path.startswith(f"{home_of(user)}/"):
            return f"{user}:{user}"
    return "root:root"


def above(path: str, machine: Machine) -> Iterator[Step]:
    """The folders of somebody's home that lead to a path in it: they must not be root's."""
    for user in (machine.user.name, *machine.users):
        if folders := parents(path, home_of(user)):
            yield ParentFolders(folders, f"{user}:{user}", name=path, why="so that they are not root's")


def own_files(machine: Machine, facts: Facts) -> Iterator[Step]:
    """Folders, files and links. A file that could lock its owner out is tried before it gets its place."""
    if facts.system != "installed":
        return
    user = machine.user.name
    for said, folder in machine.folders.items():
        path = absolute(said, user)
        yield from above(path, machine)
        yield Directory(
            path,
            mode=int(folder.mode, 8),
            owner=owner_of(path, folder.owner, machine),
            why="folders of the machine file",
        )
    values = template_values(machine) | screen_values(machine, facts)
    for said, file in machine.files.items():
        path = absolute(said, user)
        content = fill(file.text, values) if file.template else file.text
        then = "\n".join(
            filter(None, [RELOADS.get(path) or RELOADS.get(path[: path.rfind("/") + 1], ""), file.then])
        )
        mode, owner = int(file.mode, 8), owner_of(path, file.owner, machine)
        why = f"from files/{file.source}" if file.source else "text of the machine file"
        yield from above(path, machine)
        if check := check_for(path):
            yield CheckedFile(
                path, content, check=check, user=user, mode=mode, owner=owner, then=then, why=why
            )
        else:
            yield File(path, content, mode=mode, owner=owner, then=then, why=why)
    for said, target in machine.links.items():
        path = absolute(said, user)
        yield from above(path, machine)
        yield Link(path, absolute(target, user), why="links of the machine file")


def own_lines(machine: Machine, facts: Facts) -> Iterator[Step]:
    if facts.system != "installed":
        return
    for name, wanted in machine.lines.items():
        file = absolute(wanted.file, machine.user.name)
        yield Line(file, wanted.line, wanted.match, name=name, why=f"lines.{name} of the machine file")


def own_sysctl(machine: Machine, facts: Facts) -> Iterator[Step]:
    if facts.system != "installed" or not machine.sysctl:
        return
    yield File(
        "/etc/sysctl.d/90-metal.conf",
        "".join(f"{key} = {value}\n" for key, value in machine.sysctl.items()),
        why="kernel settings at every boot",
    )
    yield Sysctl(machine.sysctl, why="kernel settings now")


def own_units(machine: Machine, facts: Facts) -> Iterator[Step]:
    """After the files, which may be units."""
    if facts.system == "installed":
        for name, state in machine.units.items():
            yield UnitState(name, state, why="units of the machine file")
