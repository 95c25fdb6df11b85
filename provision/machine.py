"""What a person wants of one machine: `machines/defaults.toml` overlaid by `machines/NAME.toml`.

`load_machine` reports every error of the files at once, each with file, line and, for a misspelt
name, the nearest that exists.
"""

import dataclasses
import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints
from zoneinfo import available_timezones

from provision.errors import ProvisionError
from provision.pins import ALIAS, parse_key

PACKAGED_DEFAULTS = Path(__file__).resolve().parent.parent / "machines" / "defaults.toml"


@dataclass(frozen=True)
class Ssh:
    address: str
    port: int
    identity: str


@dataclass(frozen=True)
class DiskWanted:
    serial: str
    esp_mib: int
    filesystem: str


@dataclass(frozen=True)
class System:
    hostname: str
    timezone: str
    locale: str
    keymap: str
    kernel: str
    cmdline: str
    packages: tuple[str, ...]


@dataclass(frozen=True)
class Mirror:
    servers: tuple[str, ...]
    signatures: str


@dataclass(frozen=True)
class User:
    name: str
    authorized_keys: tuple[str, ...]
    shell: str


@dataclass(frozen=True)
class Network:
    match: str


@dataclass(frozen=True)
class Gpu:
    driver: str


@dataclass(frozen=True)
class Python:
    interpreter: str
    torch: str
    torch_index: str
    packages: tuple[str, ...]
    find_links: str
    offline: bool


@dataclass(frozen=True)
class Train:
    folder: str


@dataclass(frozen=True)
class Machine:
    """The wishes for one machine. Every field stands in `machines/defaults.toml` with its meaning."""

    name: str
    ssh: Ssh
    disk: DiskWanted
    system: System
    mirror: Mirror
    user: User
    network: Network
    gpu: Gpu
    python: Python
    train: Train


@dataclass(frozen=True)
class Layer:
    """One file: its text, and what it says."""

    path: Path
    text: str
    values: dict[str, Any]

    def where(self, section: str, key: str = "") -> str:
        """`FILE:LINE` of a section's header or of a key in it; the file alone where no line is found."""
        current = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[\s*([^]]+?)\s*\]", line):
                current = header[1].strip("\"'")
                if current == section and not key:
                    return f"{self.path}:{number}"
            elif match := re.match(r"\s*[\"']?([\w.-]+)[\"']?\s*=", line):
                if (current == section and match[1] == key) or (not current and match[1] == (key or section)):
                    return f"{self.path}:{number}"
                if not current and match[1] == f"{section}.{key}":
                    return f"{self.path}:{number}"
        return str(self.path)


def machines_folder() -> Path:
    """`$METAL_MACHINES` where it is set, else `machines/` beside the fabfile."""
    return Path(os.environ.get("METAL_MACHINES") or PACKAGED_DEFAULTS.parent).expanduser()


def known_machines(folder: Path) -> list[str]:
    """The names that have a file in the folder, sorted."""
    names = (path.name.removesuffix(".toml") for path in folder.glob("*.toml"))
    return sorted(name for name in names if name != "defaults" and not name.endswith(".local"))


def load_machine(name: str, folder: Path, *, need_disk: bool = True) -> Machine:
    """Read and check one machine's files.

    Later files win: the packaged defaults, the folder's `defaults.toml`, `NAME.toml`, `NAME.local.toml`.
    `need_disk=False` lets disk.serial be missing, for looking at a machine whose disks are not known yet.
    Raises ProvisionError with all that is wrong.
    """
    if name not in known_machines(folder):
        raise unknown_machine(name, folder)
    if not ALIAS.fullmatch(name):
        raise ProvisionError(
            f"'{name}' cannot be a machine's name; expected letters, digits, '.', '_' and '-'."
        )
    candidates = [
        PACKAGED_DEFAULTS,
        folder / "defaults.toml",
        folder / f"{name}.toml",
        folder / f"{name}.local.toml",
    ]
    paths = [
        path
        for i, path in enumerate(candidates)
        if path.exists() and not (i == 1 and same(path, candidates[0]))
    ]
    layers = [read_layer(path) for path in paths]
    problems = [problem for layer in layers for problem in check_layer(layer)]
    if not problems:
        machine = build_machine(name, layers)
        problems = [f"{locate(layers, *key)}: {text}" for key, text in check_values(machine, need_disk)]
        if not problems:
            return machine
    raise ProvisionError(
        "\n".join(
            [f"{len(problems)} error(s) in the files of machine '{name}':", *(f"  {p}" for p in problems)]
        ),
        f"Every setting and its meaning: {PACKAGED_DEFAULTS}",
    )


def same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def unknown_machine(name: str, folder: Path) -> ProvisionError:
    known = known_machines(folder)
    near = difflib.get_close_matches(name, known, 1)
    suggestion = f" Did you mean '{near[0]}'?" if near else ""
    return ProvisionError(
        f"No machine '{name}': there is no {folder / (name + '.toml')}.{suggestion}",
        f"Known machines: {', '.join(known) or 'none'}. For a new one, make that file (it may be empty at first), then see\n"
        f"which disks it has: fab -H {name} disks --address ADDRESS",
    )


def read_layer(path: Path) -> Layer:
    text = path.read_text()
    try:
        return Layer(path, text, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ProvisionError(f"{path} is not valid TOML: {error}") from error


def sections() -> dict[str, Any]:
    return {name: kind for name, kind in get_type_hints(Machine).items() if dataclasses.is_dataclass(kind)}


def check_layer(layer: Layer) -> Iterator[str]:
    """Unknown names and wrong types of one file, as `FILE:LINE: text`."""
    known = sections()
    for section, table in layer.values.items():
        if section not in known:
            yield f"{layer.where(section)}: unknown section [{section}]{nearest(section, known)}"
        elif not isinstance(table, dict):
            yield f"{layer.where(section)}: {section} must be a table: [{section}]"
        else:
            hints = get_type_hints(known[section])
            for key, value in table.items():
                if key not in hints:
                    yield f"{layer.where(section, key)}: unknown key '{key}' in [{section}]{nearest(key, hints)}"
                elif not has_type(value, hints[key]):
                    seen = f"{type(value).__name__} {value!r}"
                    yield f"{layer.where(section, key)}: {section}.{key} must be {NAMES[hints[key]]}, not {seen}"


NAMES: dict[Any, str] = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    tuple[str, ...]: "a list of strings",
}


def has_type(value: object, kind: object) -> bool:
    if kind == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return type(value) is kind


def nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"


def build_machine(name: str, layers: Sequence[Layer]) -> Machine:
    tables: dict[str, Any] = {}
    for section, kind in sections().items():
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= layer.values.get(section, {})
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in merged.items()}
        if section == "system":
            values["hostname"] = values["hostname"] or name
        if section == "user":
            values["authorized_keys"] = tuple(read_keys(values["authorized_keys"]))
        tables[section] = kind(**values)
    return Machine(name=name, **tables)


def read_keys(entries: Sequence[str]) -> Iterator[str]:
    """Public key lines; an entry that names a readable file stands for the lines of that file."""
    for entry in entries:
        path = Path(entry).expanduser()
        if " " not in entry and path.is_file():
            yield from (line.strip() for line in path.read_text().splitlines() if line.strip())
        else:
            yield entry


def locate(layers: Sequence[Layer], section: str, key: str) -> str:
    """Where the value in force was written: the last file that has it."""
    for layer in reversed(layers):
        if key in layer.values.get(section, {}):
            return layer.where(section, key)
    return str(layers[-1].path)


PACKAGE = r"[a-z0-9@_+][a-z0-9@._+-]*"  # makepkg's rule for pkgname
PATTERNS: dict[tuple[str, str], tuple[str, str]] = {
    ("system", "hostname"): (
        r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,62}[a-zA-Z0-9])?",
        "letters, digits and inner hyphens, at most 64",
    ),
    ("system", "timezone"): (r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", "a name such as Europe/Berlin"),
    ("system", "locale"): (r"[a-z]{2,3}(_[A-Z]{2})?(\.UTF-8)?(@\w+)?|C\.UTF-8", "a name such as en_US.UTF-8"),
    ("system", "keymap"): (r"[A-Za-z0-9_.-]+", "a name such as us or de-latin1"),
    ("system", "kernel"): (r"linux(-[a-z0-9-]+)?", "a kernel package such as linux-lts"),
    ("system", "cmdline"): (r"[^\n]*", "one line"),
    ("user", "name"): (r"[a-z_][a-z0-9_-]{0,31}", "lower-case letters, digits, - and _, at most 32"),
    ("user", "shell"): (r"/\S+", "an absolute path"),
    ("network", "match"): (r"[^\n]+", "interface names or patterns"),
    ("gpu", "driver"): (r"auto|open|none", "auto, open or none"),
    ("disk", "filesystem"): (r"ext4", "ext4"),
    ("python", "interpreter"): (r"\d+\.\d+(\.\d+)?|/\S+", "a version such as 3.12, or an absolute path"),
    ("train", "folder"): (r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "one folder name, below the user's home"),
    ("mirror", "signatures"): (
        r"Never|(Package|Database)?(Never|Optional|Required)( \w+)*",
        "pacman's SigLevel",
    ),
}


def is_key(line: str) -> bool:
    try:
        return bool(parse_key(line))
    except ValueError:
        return False


def check_values(machine: Machine, need_disk: bool) -> Iterator[tuple[tuple[str, str], str]]:
    """What types cannot say, as ((section, key), text)."""
    for (section, key), (pattern, meaning) in PATTERNS.items():
        value = getattr(getattr(machine, section), key)
        if not re.fullmatch(pattern, value):
            yield (section, key), f"{section}.{key} is {value!r}; expected {meaning}"
    if need_disk and not machine.disk.serial:
        yield (
            ("disk", "serial"),
            (
                "disk.serial is missing: the serial number of the disk to install on. "
                f"`fab -H {machine.name} disks` lists those of the machine"
            ),
        )
    if not 512 <= machine.disk.esp_mib <= 16384:
        yield ("disk", "esp_mib"), f"disk.esp_mib is {machine.disk.esp_mib}; expected 512 to 16384"
    if not 1 <= machine.ssh.port <= 65535:
        yield ("ssh", "port"), f"ssh.port is {machine.ssh.port}; expected 1 to 65535"
    if (zones := available_timezones()) and machine.system.timezone not in zones:
        near = nearest(machine.system.timezone, sorted(zones)).partition("; known")[0]
        yield ("system", "timezone"), f"system.timezone {machine.system.timezone!r} is unknown{near}"
    if machine.user.name == "root":
        yield ("user", "name"), "user.name is root; expected an ordinary user: root does not log in over SSH"
    if not machine.user.authorized_keys:
        yield (
            ("user", "authorized_keys"),
            "user.authorized_keys is empty: nobody could log in to the installed machine",
        )
    for key in machine.user.authorized_keys:
        if not is_key(key):
            yield (
                ("user", "authorized_keys"),
                f"{key!r} is neither a public key line nor a file that holds one",
            )
    for package in machine.system.packages:
        if not re.fullmatch(PACKAGE, package):
            yield ("system", "packages"), f"{package!r} is not a package name"
    if not machine.mirror.servers:
        yield ("mirror", "servers"), "mirror.servers is empty"
    for server in machine.mirror.servers:
        if not re.fullmatch(r"(https?|file)://\S+", server) or "$repo" not in server:
            yield ("mirror", "servers"), f"{server!r} is not a URL with $repo in it"
    if machine.python.offline and not machine.python.find_links:
        yield (
            ("python", "offline"),
            "python.offline is true, so python.find_links must name a folder of wheels",
        )


def state_folder(name: str) -> Path:
    """Where logs of a machine are kept on this computer: below `$XDG_STATE_HOME`, by default `~/.local/state`."""
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return base / "metal-to-model" / name


def save_local(folder: Path, name: str, section: str, key: str, value: str) -> None:
    """Put one setting into `NAME.local.toml`, atomically; its other settings stay, its comments do not."""
    path = folder / f"{name}.local.toml"
    values = read_layer(path).values if path.exists() else {}
    values.setdefault(section, {})[key] = value
    lines = ["# Written by fab: what is true of this machine only here and now."]
    for table, settings in values.items():
        lines += [
            f"[{table}]",
            *(f"{setting} = {json.dumps(wanted)}" for setting, wanted in settings.items()),
        ]
    staged = path.with_suffix(".partial")
    staged.write_text("\n".join(lines) + "\n")
    staged.replace(path)
