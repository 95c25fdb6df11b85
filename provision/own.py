"""What a person adds to their machines: files, lines, users, units and the like, each by a name of its own.

Sections of such things are merged name by name over the files of a machine: a base says some, the machine's own file
adds others, changes one, or takes one away (`NAME = false`). What is in a table and has no default must be said.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from pathlib import Path, PurePosixPath
from typing import Annotated

from provision.rules import (
    COMMIT,
    INTERPRETER,
    NAME,
    ONE_LINE,
    PACKAGE,
    PATH,
    REQUIREMENT,
    SHELL,
    USER,
    Between,
    Rule,
)
from provision.secrets import HOW, Secret

NO_SECRET = Secret()
MOST_BYTES = 256 * 1024  # every probe of a file shows it whole

TEXT = Rule(r"[^\0]*", "text without a NUL")
OWNER = Rule(r"([a-z_][a-z0-9_-]*:[a-z_][a-z0-9_-]*)?", "user:group")
MODE = Rule(r"[0-7]{3,4}", "an octal mode such as 644 or 0600")
SOURCE = Rule(
    r"(([A-Za-z0-9_@-]|\.(?!\.?(/|$)))[A-Za-z0-9_.@+-]*(/|$))*",
    "a path below the folder files/ beside the machine files",
)
TARGET = Rule(r"[^\x00-\x1f\x7f]+", "what a link leads to")
UNIT = Rule(r"[A-Za-z0-9:_.@\\-]+\.(service|socket|timer|path|mount|target)", "a unit such as docker.service")
UNIT_STATE = Rule(r"enabled|disabled|masked", "enabled, disabled or masked")
SYSCTL = Rule(r"[a-z0-9_]+(\.[A-Za-z0-9_/-]+)+", "a kernel setting such as vm.swappiness")
VALUE = Rule(r"[^\x00-\x1f\x7f]+", "one line")
# What bash's regular expressions (POSIX) and those of the check here (Python) read alike.
MATCH = Rule(
    r"((?!\\[A-Za-z0-9]|\(\?|\[:)[^\n\0])*", "a POSIX extended expression without \\w, \\d, (? and [:"
)


NETWORK = Rule(
    r"[0-9]{1,3}(\.[0-9]{1,3}){3}(/[0-9]{1,2})?",
    "an IPv4 address such as 10.0.0.7, or a network such as 10.0.0.0/24",
)
PORTS = Rule(r"[1-9][0-9]{0,4}(-[1-9][0-9]{0,4})?", "a port, or a range such as 8000-8010")
# NetworkManager's files know escapes for the rest; nobody has needed them yet.
SSID = Rule(
    r"(?! )[^\x00-\x1f\x7f;\\]{1,32}(?<! )",
    "a network's name: 1 to 32 characters without ; and backslash, blanks inside only",
)


@dataclass(frozen=True)
class FileWanted:
    """`text` is the content: as the machine file has it, or that of `source`, which `read_sources` puts there."""

    source: Annotated[str, SOURCE] = ""
    text: Annotated[str, TEXT] = ""
    template: bool = False
    owner: Annotated[str, OWNER] = ""
    mode: Annotated[str, MODE] = "644"
    then: Annotated[str, ONE_LINE] = ""


@dataclass(frozen=True)
class FolderWanted:
    owner: Annotated[str, OWNER] = ""
    mode: Annotated[str, MODE] = "755"


@dataclass(frozen=True)
class LineWanted:
    file: Annotated[str, PATH]
    line: Annotated[str, Rule(r"[^\x00-\x08\x0a-\x1f\x7f]*", "one line")] = ""
    match: Annotated[str, MATCH] = ""


@dataclass(frozen=True)
class UserWanted:
    groups: Annotated[tuple[str, ...], USER] = ()
    shell: Annotated[str, SHELL] = "/bin/bash"
    authorized_keys: tuple[str, ...] = ()
    password: Secret = NO_SECRET


@dataclass(frozen=True)
class AurWanted:
    """A source package of the AUR at a commit that a person has read; `packages` of those it makes, () = that of its name."""

    commit: Annotated[str, COMMIT]
    packages: Annotated[tuple[str, ...], PACKAGE] = ()


@dataclass(frozen=True)
class WifiWanted:
    passphrase: Secret = NO_SECRET
    security: Annotated[str, Rule(r"wpa2|wpa3|open", "wpa2, wpa3 or open")] = "wpa2"
    hidden: bool = False
    priority: Annotated[int, Between(-999, 999)] = 0


@dataclass(frozen=True)
class EnvironmentWanted:
    """A Python environment. `lock` is a file's name, and once the machine file is read, by `read_locks`, its text."""

    requirements: Annotated[tuple[str, ...], REQUIREMENT] = ()
    lock: Annotated[str, SOURCE] = ""
    interpreter: Annotated[str, Rule(f"({INTERPRETER.pattern})?", INTERPRETER.meaning)] = ""


@dataclass(frozen=True)
class Sshd:
    hardened: bool


@dataclass(frozen=True)
class Firewall:
    enabled: bool
    tcp: Annotated[tuple[str, ...], PORTS]
    udp: Annotated[tuple[str, ...], PORTS]
    peers: Annotated[tuple[str, ...], NETWORK]


@dataclass(frozen=True)
class Timers:
    fstrim: bool
    paccache: bool
    reflector: bool


@dataclass(frozen=True)
class Desktop:
    kind: Annotated[str, Rule(r"none|sway|i3", "none, sway or i3")]
    autologin: bool
    keyboard: Annotated[str, Rule(r"[a-z]{2,12}( [a-z0-9_-]+)?", "a layout such as us, or de nodeadkeys")]
    screen: Annotated[str, Rule(r"([A-Za-z0-9-]+)?", "a connector such as eDP-1 or DP-1")]
    scale_percent: Annotated[int, Between(0, 400)]
    dpi: Annotated[int, Between(0, 400)]
    font_size: Annotated[int, Between(0, 72)]


Packages = Annotated[Mapping[str, tuple[str, ...]], NAME, PACKAGE]
Values = Annotated[Mapping[str, str], Rule(r"[a-z][a-z0-9_]*", "lower-case letters, digits and _"), TEXT]
Files = Annotated[Mapping[str, FileWanted], PATH]
Folders = Annotated[Mapping[str, FolderWanted], PATH]
Links = Annotated[Mapping[str, str], PATH, TARGET]
Lines = Annotated[Mapping[str, LineWanted], NAME]
Users = Annotated[Mapping[str, UserWanted], USER]
Units = Annotated[Mapping[str, str], UNIT, UNIT_STATE]
Sysctl = Annotated[Mapping[str, str], SYSCTL, VALUE]

# What a template may name of the screen: see provision.system.scale.
SCREEN_NAMES = ("screen.scale", "screen.dpi", "screen.font_size")

Aur = Annotated[Mapping[str, AurWanted], PACKAGE]
Wifi = Annotated[Mapping[str, WifiWanted], SSID]
Environments = Annotated[Mapping[str, EnvironmentWanted], NAME]

Problem = tuple[tuple[str, ...], str]  # (where in the machine file, what is wrong)


def home_of(user: str) -> str:
    return f"/home/{user}"


def absolute(path: str, user: str) -> str:
    """A path of the machine; ~ is the home of the machine's user."""
    return home_of(user) + path[1:] if path.startswith("~") else path


def read_sources(
    files: Mapping[str, FileWanted], folder: Path
) -> tuple[dict[str, FileWanted], list[Problem]]:
    """The files with the text of what they name below `folder`, and what of that cannot be."""
    read: dict[str, FileWanted] = {}
    problems: list[Problem] = []
    for path, wanted in files.items():
        read[path] = wanted
        if wanted.source and wanted.text:
            problems.append((("files", path, "text"), "has both source and text; expected one of them"))
        elif wanted.source:
            try:
                read[path] = replace(wanted, text=read_source(folder / wanted.source))
            except (OSError, ValueError) as error:
                there = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
                reason = error.strerror if isinstance(error, OSError) else str(error)
                listed = f"; there are: {', '.join(there)}" if there else ""
                problems.append(
                    (("files", path, "source"), f"{folder / wanted.source}: {reason}{listed}"[:380])
                )
    return read, problems


def read_locks(locks: Mapping[tuple[str, ...], str], folder: Path) -> tuple[list[str], list[Problem]]:
    """The texts of lock files below `folder`, by where they are named ("" for none), and what of that cannot be."""
    texts: list[str] = []
    problems: list[Problem] = []
    for where, name in locks.items():
        texts.append("")
        try:
            texts[-1] = read_source(folder / name) if name else ""
            if name and not texts[-1].strip():
                raise ValueError("it is empty")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            problems.append((where, f"{folder / name}: {reason}"))
    return texts, problems


def check_environments(environments: Mapping[str, EnvironmentWanted]) -> Iterator[Problem]:
    for name, wanted in environments.items():
        if bool(wanted.lock) == bool(wanted.requirements):
            both = "both requirements and" if wanted.lock else "neither requirements nor"
            yield ("environments", name), f"has {both} a lock; expected one of them"


def read_source(path: Path) -> str:
    """The text of a file. OSError, or ValueError where it is no text or too long."""
    data = path.read_bytes()
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has {len(data)} bytes; expected at most {MOST_BYTES}")
    if b"\0" in data:
        raise ValueError("it is not text: it holds a NUL")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not text: it is not UTF-8") from None


# Without these nobody gets in, or nothing of the machine is reached.
NEVER_OFF = ("sshd.service", "systemd-resolved.service")


def check_paths(paths: Iterable[tuple[tuple[str, ...], str]]) -> Iterator[Problem]:
    """One path may be one thing. `paths`: (where it is said, the absolute path)."""
    seen: dict[str, tuple[str, ...]] = {}
    for where, path in paths:
        if path in seen:
            yield where, f"{path} is {seen[path][0]}.{seen[path][1]} too; expected one of them"
        seen.setdefault(path, where)


def check_lines(lines: Mapping[str, LineWanted]) -> Iterator[Problem]:
    for name, wanted in lines.items():
        where = ("lines", name, "match")
        if not wanted.line and not wanted.match:
            yield where, "has neither line nor match; expected line, or match where lines are to go"
            continue
        try:
            fits = re.search(wanted.match, wanted.line)
        except re.error as error:
            yield where, f"{wanted.match!r} is no expression: {error}"
            continue
        if wanted.line and wanted.match and not fits:
            yield (
                where,
                f"{wanted.match!r} does not match the line itself, so it would be added again every time",
            )


def check_units(units: Mapping[str, str], *, wifi: bool) -> Iterator[Problem]:
    needed = (*NEVER_OFF, "NetworkManager.service" if wifi else "systemd-networkd.service")
    for name, state in units.items():
        if name in needed and state != "enabled":
            yield ("units", name), f"{name} {state}: nobody could reach the machine any more"


def parents(path: str, above: str) -> list[str]:
    """The folders between `above` and a path in it, outer ones first."""
    return [
        str(folder) for folder in reversed(PurePosixPath(path).parents) if str(folder).startswith(above + "/")
    ]


def check_ports(setting: str, ports: Iterable[str]) -> Iterator[Problem]:
    for port in ports:
        least, _, greatest = port.partition("-")
        if not int(least) <= int(greatest or least) <= 65535:
            yield ("firewall", setting), f"{port!r} is no port and no range of them; they end at 65535"


def check_peers(peers: Iterable[str]) -> Iterator[Problem]:
    for peer in peers:
        try:
            IPv4Network(peer)
        except ValueError as error:
            yield ("firewall", "peers"), f"{error}: {NETWORK.meaning}"


def check_wifi(wifi: Mapping[str, WifiWanted]) -> Iterator[Problem]:
    for name, wanted in wifi.items():
        if len(name.encode()) > 32:
            yield ("wifi", name), f"{len(name.encode())} bytes; a network's name has at most 32"
        if wanted.security == "open" and wanted.passphrase:
            yield ("wifi", name, "passphrase"), 'security = "open" takes no passphrase'
        if wanted.security != "open" and not wanted.passphrase:
            yield ("wifi", name), f'lacks the passphrase, {HOW}; or security = "open"'
