"""What a person wants of one machine: `machines/defaults.toml` overlaid by `machines/NAME.toml` and what that extends.

A setting is a field of the dataclasses below: its type, and a rule for what types cannot say. From them come the
checks here and the JSON Schema of `provision.schema`. `load_machine` reports every error of the files at once, each
with file, line and, for a misspelt name, the nearest that exists.
"""

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints
from zoneinfo import available_timezones

from provision import own
from provision.errors import ProvisionError
from provision.layers import (
    EXTENDS,
    Layer,
    extendable,
    nearest,
    read_layer,
    render_key,
    render_value,
    stack_layers,
)
from provision.pins import ALIAS, parse_key
from provision.rules import INTERPRETER, ONE_LINE, PACKAGE, REQUIREMENT, SHELL, URL, USER, Between, Rule
from provision.secrets import HOW, REFERENCE, Secret
from provision.templates import check_template

PACKAGED_DEFAULTS = Path(__file__).resolve().parent.parent / "machines" / "defaults.toml"


SERIAL = Rule(r"(\S([^\n]*\S)?)?", "a serial number or a name in /dev/disk/by-id, without blanks around it")


@dataclass(frozen=True)
class Ssh:
    address: Annotated[str, Rule(r"([A-Za-z0-9_:][A-Za-z0-9_.:%-]*)?", "a host name or an IP address")]
    port: Annotated[int, Between(1, 65535)]
    identity: Annotated[str, ONE_LINE]


@dataclass(frozen=True)
class DiskWanted:
    serial: Annotated[str, SERIAL]
    size_gib: Annotated[int, Between(0, 2**20)]
    mirror: Annotated[str, SERIAL]
    esp_mib: Annotated[int, Between(512, 16384)]
    filesystem: Annotated[str, Rule(r"ext4|btrfs", "ext4 or btrfs")]
    root_gib: Annotated[int, Between(0, 2**20)]
    swap: Annotated[str, Rule(r"zram|partition|file|none", "zram, partition, file or none")]
    swap_gib: Annotated[int, Between(0, 2**12)]
    encryption: Annotated[str, Rule(r"none|luks", "none or luks")]
    passphrase: Secret
    unlock: Annotated[str, Rule(r"(tpm2|ssh|console)?", "tpm2, ssh, console or nothing")]
    data: Annotated[
        tuple[str, ...], Rule(r"\S([^\n]*\S)? (/[A-Za-z0-9._-]+)+", "a serial number, a blank and a folder")
    ]

    @property
    def system_serials(self) -> tuple[str, ...]:
        """What names the disk of the system and, where there is one, its mirror."""
        return tuple(filter(None, (self.serial, self.mirror)))

    @property
    def data_disks(self) -> tuple[tuple[str, str], ...]:
        """(serial, folder) of each."""
        return tuple((entry.rpartition(" ")[0], entry.rpartition(" ")[2]) for entry in self.data)


@dataclass(frozen=True)
class System:
    hostname: Annotated[
        str,
        Rule(
            r"([a-zA-Z0-9]([a-zA-Z0-9-]{0,62}[a-zA-Z0-9])?)?",
            "letters, digits and inner hyphens, at most 64",
        ),
    ]
    timezone: Annotated[str, Rule(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", "a name such as Europe/Berlin")]
    locale: Annotated[str, Rule(r"([a-z]{2,3}_[A-Z]{2}|C)\.UTF-8", "a name such as en_US.UTF-8")]
    keymap: Annotated[str, Rule(r"[A-Za-z0-9_.-]+", "a name such as us or de-latin1")]
    kernels: Annotated[tuple[str, ...], Rule(r"linux(-[a-z0-9-]+)?", "a kernel package such as linux-lts")]
    cmdline: Annotated[str, ONE_LINE]
    packages: Annotated[tuple[str, ...], PACKAGE]
    groups: Annotated[tuple[str, ...], PACKAGE]


@dataclass(frozen=True)
class Mirror:
    servers: Annotated[
        tuple[str, ...], Rule(r"(https?|file)://\S*\$repo\S*", "a URL with $repo (and $arch) in it")
    ]
    signatures: Annotated[
        str, Rule(r"Never|(Package|Database)?(Never|Optional|Required)( \w+)*", "pacman's SigLevel")
    ]
    countries: Annotated[tuple[str, ...], Rule(r"[A-Za-z][A-Za-z ]*", "a country, by name or by two letters")]
    archive: Annotated[str, Rule(r"(https?|file)://[^\s']+", "a URL")]


@dataclass(frozen=True)
class User:
    name: Annotated[str, USER]
    authorized_keys: tuple[str, ...]
    password: Secret
    shell: Annotated[str, SHELL]


@dataclass(frozen=True)
class Network:
    match: Annotated[str, Rule(r"[^\n]+", "interface names or patterns")]


@dataclass(frozen=True)
class Gpu:
    driver: Annotated[str, Rule(r"auto|open|none", "auto, open or none")]
    legacy_commit: Annotated[str, Rule(r"([0-9a-f]{40})?", "the 40 hexadecimal digits of a git commit")]
    cuda: bool
    container_toolkit: bool


@dataclass(frozen=True)
class Python:
    """`lock` is a file's name, and once the machine file is read, by `own.read_locks`, its text."""

    interpreter: Annotated[str, INTERPRETER]
    interpreter_mirror: Annotated[str, URL]
    torch: Annotated[str, REQUIREMENT]
    torch_index: Annotated[str, URL]
    packages: Annotated[tuple[str, ...], REQUIREMENT]
    lock: Annotated[str, own.SOURCE]
    index: Annotated[str, URL]
    find_links: Annotated[str, URL]
    offline: bool


@dataclass(frozen=True)
class Train:
    folder: Annotated[str, Rule(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "one folder name, below the user's home")]


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
    sshd: own.Sshd
    firewall: own.Firewall
    timers: own.Timers
    desktop: own.Desktop
    packages: own.Packages
    values: own.Values
    files: own.Files
    folders: own.Folders
    links: own.Links
    lines: own.Lines
    users: own.Users
    units: own.Units
    sysctl: own.Sysctl
    wifi: own.Wifi
    aur: own.Aur
    environments: own.Environments


@dataclass(frozen=True)
class Setting:
    """One field of one section: its type without the rule, and the rule; `required` where a table must have it."""

    kind: Any
    rule: Rule | Between | None
    required: bool = False


@dataclass(frozen=True)
class Named:
    """A section of things that the person names: what a name may be, and each thing: one value, or a table of them."""

    name: Rule
    each: Setting | dict[str, Setting]
    kind: Any  # the dataclass of a table


@functools.cache
def settings() -> dict[str, dict[str, Setting]]:
    """Every section and its settings, as the dataclasses declare them."""
    return {section: dict(declared(kind)) for section, kind in sections().items()}


def sections() -> dict[str, Any]:
    return {name: kind for name, kind in get_type_hints(Machine).items() if dataclasses.is_dataclass(kind)}


@functools.cache
def named_sections() -> dict[str, Named]:
    """Every section whose keys the person chooses."""
    found = {}
    for section, hint in get_type_hints(Machine, include_extras=True).items():
        if hasattr(hint, "__metadata__") and get_origin(get_args(hint)[0]) is Mapping:
            kind = get_args(get_args(hint)[0])[1]
            name, *rule = hint.__metadata__
            each = dict(declared(kind)) if dataclasses.is_dataclass(kind) else Setting(kind, *rule)
            found[section] = Named(name, each, kind)
    return found


def declared(kind: Any) -> Iterator[tuple[str, Setting]]:
    required = {
        field.name for field in dataclasses.fields(kind) if field.default is field.default_factory
    }  # both are MISSING
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if hasattr(hint, "__metadata__"):
            yield name, Setting(get_args(hint)[0], hint.__metadata__[0], name in required)
        else:
            yield name, Setting(hint, Rule(REFERENCE, HOW) if hint is Secret else None, name in required)


def machines_folder() -> Path:
    """`$METAL_MACHINES` where it is set, else `machines/` beside the fabfile."""
    return Path(os.environ.get("METAL_MACHINES") or PACKAGED_DEFAULTS.parent).expanduser()


def known_machines(folder: Path) -> list[str]:
    """The names that have a file in the folder, sorted."""
    return extendable(folder)


def load_machine(name: str, folder: Path, *, need_disk: bool = True) -> Machine:
    """Read and check one machine's files.

    Later files win: the packaged defaults, the folder's `defaults.toml`, what `NAME.toml` extends, `NAME.toml`,
    `NAME.local.toml`. `need_disk=False` lets disk.serial be missing, for looking at a machine whose disks are not
    known yet. Raises ProvisionError with all that is wrong.
    """
    if name not in known_machines(folder):
        raise unknown_machine(name, folder)
    return build_checked(name, folder, frozenset() if need_disk else frozenset({("disk", "serial")}))


def load_stranger(name: str, folder: Path) -> Machine:
    """A machine that may have no file yet, as far as is needed to dial it: without a disk and keys that log in."""
    return build_checked(name, folder, frozenset({("disk", "serial"), ("user", "authorized_keys")}))


def build_checked(name: str, folder: Path, unneeded: frozenset[tuple[str, str]]) -> Machine:
    """The Machine of these files, or ProvisionError. Problems of the settings in `unneeded` as a whole do not count."""
    if not ALIAS.fullmatch(name):
        raise ProvisionError(
            f"'{name}' cannot be a machine's name; expected letters, digits, '.', '_' and '-'."
        )
    stack = stack_layers(name, folder, PACKAGED_DEFAULTS)
    problems = [*stack.problems, *(problem for layer in stack.layers for problem in check_layer(layer))]
    if not problems:
        problems = [f"{locate(stack.layers, *keys)}: {text}" for keys, text in missing_keys(stack.layers)]
    if not problems:
        machine = build_machine(name, stack.layers)
        files, unread = own.read_sources(machine.files, folder / "files")
        machine, unlocked = with_locks(dataclasses.replace(machine, files=files), folder / "files")
        problems = [
            f"{locate(stack.layers, *keys)}: {text}"
            for keys, text in check_whole(machine)
            if keys not in unneeded
        ] + [
            f"{locate(stack.layers, *keys)}: {dotted(keys[:2])}: {text}"
            for keys, text in (*unread, *unlocked, *check_own(machine))
        ]
        if not problems:
            return machine
    raise ProvisionError(
        "\n".join(
            [f"{len(problems)} error(s) in the files of machine '{name}':", *(f"  {p}" for p in problems)]
        ),
        f"Every setting and its meaning: {PACKAGED_DEFAULTS}",
    )


def with_locks(machine: Machine, folder: Path) -> tuple[Machine, list[own.Problem]]:
    """The machine with the texts of its lock files, which lie below `folder`."""
    named: dict[tuple[str, ...], str] = {("python", "lock"): machine.python.lock}
    named |= {("environments", name, "lock"): wanted.lock for name, wanted in machine.environments.items()}
    (text, *texts), problems = own.read_locks(named, folder)
    environments = {
        name: dataclasses.replace(wanted, lock=lock)
        for (name, wanted), lock in zip(machine.environments.items(), texts, strict=True)
    }
    python = dataclasses.replace(machine.python, lock=text)
    return dataclasses.replace(machine, python=python, environments=environments), problems


def unknown_machine(name: str, folder: Path) -> ProvisionError:
    known = known_machines(folder)
    near = difflib.get_close_matches(name, known, 1)
    suggestion = f" Did you mean '{near[0]}'?" if near else ""
    return ProvisionError(
        f"No machine '{name}': there is no {folder / (name + '.toml')}.{suggestion}",
        f"Known machines: {', '.join(known) or 'none'}. For a new one, boot the install ISO on it; this drafts its file:\n"
        f"fab -H {name} inspect --address ADDRESS",
    )


def check_layer(layer: Layer) -> Iterator[str]:
    """What is wrong in one file, as `FILE:LINE: text`: unknown names, wrong types, values against their rule."""
    known = settings()
    for section, table in layer.values.items():
        if section == EXTENDS:
            continue
        if section not in known and section not in named_sections():
            listed = [*known, *named_sections()]
            yield f"{layer.where(section)}: unknown section [{section}]{nearest(section, listed)}"
        elif not isinstance(table, dict):
            yield f"{layer.where(section)}: {section} must be a table: [{section}]"
        elif section in named_sections():
            yield from check_named(layer, section, table)
        else:
            for key, value in table.items():
                if key not in known[section]:
                    text = f"unknown key '{key}' in [{section}]{nearest(key, known[section])}"
                    yield f"{layer.where(section, key)}: {text}"
                else:
                    for text in check_value(f"{section}.{key}", value, known[section][key]):
                        yield f"{layer.where(section, key)}: {text}"


def check_named(layer: Layer, section: str, table: dict[str, Any]) -> Iterator[str]:
    """What is wrong in a section whose keys the person chooses. `NAME = false` takes away what a lower file says."""
    known = named_sections()[section]
    for name, value in table.items():
        if not re.fullmatch(known.name.pattern, name):
            yield f"{layer.where(section, name)}: [{section}]: {shorten(name)} is not {known.name.meaning}"
        elif value is False:
            continue
        elif isinstance(known.each, Setting):
            for text in check_value(dotted((section, name)), value, known.each):
                yield f"{layer.where(section, name)}: {text}"
        elif not isinstance(value, dict):
            text = f"{dotted((section, name))} must be a table, or false where it is not wanted"
            yield f"{layer.where(section, name)}: {text}"
        else:
            for key, inner in value.items():
                where = layer.where(section, name, key)
                if key not in known.each:
                    yield f"{where}: unknown key {shorten(key)} in [{dotted((section, name))}]{nearest(key, known.each)}"
                else:
                    for text in check_value(dotted((section, name, key)), inner, known.each[key]):
                        yield f"{where}: {text}"


def dotted(keys: Sequence[str]) -> str:
    """A setting as a person writes it: `files."/etc/motd".mode`."""
    return ".".join(shorten_text(render_key(key)) for key in keys)


NAMES: dict[Any, str] = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    tuple[str, ...]: "a list of strings",
    Secret: "a string",
}


def check_value(name: str, value: object, setting: Setting) -> Iterator[str]:
    """What is wrong with one value. A secret's is never shown: it may be the secret itself, put there by mistake."""
    kind, rule = setting.kind, setting.rule
    if not has_type(value, kind):
        seen = "" if kind is Secret else f", not {type(value).__name__} {shorten(value)}"
        yield f"{name} must be {NAMES[kind]}{seen}" + (f": {HOW}" if kind is Secret else "")
    elif isinstance(rule, Between) and isinstance(value, int) and not rule.least <= value <= rule.greatest:
        yield f"{name} is {value}; expected {rule.least} to {rule.greatest}"
    elif isinstance(rule, Rule) and isinstance(value, str) and not re.fullmatch(rule.pattern, value):
        seen = "holds no reference" if kind is Secret else f"is {shorten(value)}"
        yield f"{name} {seen}; expected {rule.meaning}"
    elif isinstance(rule, Rule) and isinstance(value, list):
        for item in value:
            if not re.fullmatch(rule.pattern, item):
                yield f"{name}: {shorten(item)} is not {rule.meaning}"


def shorten(value: object) -> str:
    return shorten_text(repr(value))


def shorten_text(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:76]} …"


def has_type(value: object, kind: object) -> bool:
    if kind == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return type(value) is (str if kind is Secret else kind)


def build_machine(name: str, layers: Sequence[Layer]) -> Machine:
    """The layers' values, later ones over earlier ones; the layers are checked."""
    tables: dict[str, Any] = {}
    for section, kind in sections().items():
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= layer.values.get(section, {})
        known = settings()[section]
        values = {key: convert(value, known[key].kind) for key, value in merged.items()}
        if section == "system":
            values["hostname"] = values["hostname"] or name
        if section == "user":
            values["authorized_keys"] = tuple(read_keys(values["authorized_keys"]))
        tables[section] = kind(**values)
    for section, thing in named_sections().items():
        tables[section] = {
            name: build_named(thing, value) for name, value in merge_named(section, layers).items()
        }
    return Machine(name=name, **tables)


def merge_named(section: str, layers: Sequence[Layer]) -> dict[str, Any]:
    """The things of a section that the person names: tables of one name are merged, of values the last one counts."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.values.get(section, {}).items():
            if value is False:
                merged.pop(name, None)
            elif isinstance(value, dict):
                merged[name] = merged.get(name, {}) | value
            else:
                merged[name] = value
    return merged


def build_named(known: Named, value: Any) -> Any:
    if isinstance(known.each, Setting):
        return convert(value, known.each.kind)
    values = {key: convert(inner, known.each[key].kind) for key, inner in value.items()}
    if "authorized_keys" in values:
        values["authorized_keys"] = tuple(read_keys(values["authorized_keys"]))
    return known.kind(**values)


def missing_keys(layers: Sequence[Layer]) -> Iterator[own.Problem]:
    """Tables that lack what they must have, as the files together say them."""
    for section, known in named_sections().items():
        if isinstance(known.each, Setting):
            continue
        for name, table in merge_named(section, layers).items():
            for key, setting in known.each.items():
                if setting.required and key not in table:
                    yield (section, name), f"{dotted((section, name))} lacks '{key}'"


def convert(value: Any, kind: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return Secret(value) if kind is Secret else value


def read_keys(entries: Sequence[str]) -> Iterator[str]:
    """Public key lines; an entry that names a readable file stands for the lines of that file."""
    for entry in entries:
        try:
            lines = Path(entry).expanduser().read_text().splitlines() if " " not in entry else [entry]
        except (
            OSError,
            ValueError,
            RuntimeError,
        ):  # no such file, no text, no such home: then it is no key either
            lines = [entry]
        yield from (line.strip() for line in lines if line.strip())


def locate(layers: Sequence[Layer], *keys: str) -> str:
    """Where the value in force was written: the last file that has it, or what contains it."""
    for depth in range(len(keys), 1, -1):
        for layer in reversed(layers):
            if keys[:depth] in layer.lines:
                return layer.where(*keys[:depth])
    return str(layers[-1].path)


@functools.cache
def time_zones() -> frozenset[str]:
    return frozenset(available_timezones())


def is_key(line: str) -> bool:
    try:
        return bool(parse_key(line))
    except ValueError:
        return False


def check_whole(machine: Machine) -> Iterator[tuple[tuple[str, str], str]]:
    """What no value shows alone, as ((section, key), text)."""
    if not machine.disk.serial:
        yield (
            ("disk", "serial"),
            (
                "disk.serial is missing: the serial number of the disk to install on. "
                f"`fab -H {machine.name} disks` lists those of the machine"
            ),
        )
    yield from check_disks(machine.disk)
    if not machine.system.kernels:
        yield ("system", "kernels"), "system.kernels is empty; expected at least one, such as linux-lts"
    if time_zones() and machine.system.timezone not in time_zones():
        near = nearest(machine.system.timezone, sorted(time_zones())).partition("; known")[0]
        yield ("system", "timezone"), f"system.timezone {machine.system.timezone!r} is unknown{near}"
    if not re.fullmatch(hostname_rule().pattern, machine.system.hostname):
        yield (
            ("system", "hostname"),
            f"'{machine.name}' cannot be a host name: set system.hostname to {hostname_rule().meaning}",
        )
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
                f"{shorten(key)} is neither a public key line nor a file that holds one",
            )
    if not machine.mirror.servers:
        yield ("mirror", "servers"), "mirror.servers is empty"
    if machine.python.offline and not machine.python.find_links:
        yield (
            ("python", "offline"),
            "python.offline is true, so python.find_links must name a folder of wheels",
        )


def check_own(machine: Machine) -> Iterator[own.Problem]:
    """What contradicts itself in what the person adds."""
    user = machine.user.name
    said = [(("files", path), path) for path in machine.files]
    said += [(("folders", path), path) for path in machine.folders]
    said += [(("links", path), path) for path in machine.links]
    yield from own.check_paths((where, own.absolute(path, user)) for where, path in said)
    yield from own.check_lines(machine.lines)
    yield from own.check_units(machine.units, wifi=bool(machine.wifi))
    yield from own.check_wifi(machine.wifi)
    yield from own.check_environments(machine.environments)
    yield from own.check_ports("tcp", machine.firewall.tcp)
    yield from own.check_ports("udp", machine.firewall.udp)
    yield from own.check_peers(machine.firewall.peers)
    for opened in ("tcp", "udp", "peers"):
        if getattr(machine.firewall, opened) and not machine.firewall.enabled:
            yield ("firewall", opened), "opens ports of a firewall that is not there: enabled = true"
    yield from check_reflector(machine)
    yield from check_desktop(machine)
    for path, wanted in machine.files.items():
        wrong = check_template(wanted.text, template_names(machine)) if wanted.template else None
        if wrong:
            place = f"line {wrong[0]} of {wanted.source or 'text'}"
            yield (
                ("files", path, "source" if wanted.source else "text"),
                f"{place}: {wrong[1]}",
            )
    for name, other in machine.users.items():
        if name in (user, "root"):
            yield ("users", name), f"that is {'user.name' if name == user else 'root'} already"
        for key in other.authorized_keys:
            if not is_key(key):
                text = f"{shorten(key)} is neither a public key line nor a file that holds one"
                yield ("users", name, "authorized_keys"), text


def check_reflector(machine: Machine) -> Iterator[own.Problem]:
    """What would have two masters: the list of mirrors, which reflector writes."""
    if machine.timers.reflector:
        for server in machine.mirror.servers:
            if server.startswith("file:") or "archive.archlinux.org" in server:
                text = f"would replace {server}, which mirror.servers names on purpose"
                yield ("timers", "reflector"), text
    elif machine.mirror.countries:
        yield ("mirror", "countries"), "is for reflector: timers.reflector = true"


def check_desktop(machine: Machine) -> Iterator[own.Problem]:
    desktop = machine.desktop
    if desktop.kind == "none":
        if desktop.autologin:
            yield ("desktop", "autologin"), 'there is no desktop to log in to: kind = "sway" or "i3"'
        return
    if not desktop.autologin and not machine.user.password:
        text = f"nobody could log in: {machine.user.name} has no password (user.password), and autologin is false"
        yield ("desktop", "kind"), text
    if desktop.kind == "i3" and desktop.scale_percent:
        yield ("desktop", "scale_percent"), "X11 knows no scale: set dpi, or font_size"
    if desktop.kind == "sway" and desktop.dpi:
        yield ("desktop", "dpi"), "Wayland knows no DPI: set scale_percent, or font_size"


def template_values(machine: Machine) -> dict[str, str]:
    """What a template may name, but for what the hardware says: every setting that is no secret, and the person's own."""
    values = {"name": machine.name}
    for section, known in settings().items():
        for key, setting in known.items():
            if setting.kind is not Secret:
                value = getattr(getattr(machine, section), key)
                text = " ".join(value) if isinstance(value, tuple) else str(value)
                values[f"{section}.{key}"] = text.lower() if isinstance(value, bool) else text
    return values | {f"values.{name}": value for name, value in machine.values.items()}


def template_names(machine: Machine) -> set[str]:
    return {*template_values(machine), *own.SCREEN_NAMES}


SYSTEM_FOLDERS = (
    "bin",
    "boot",
    "dev",
    "etc",
    "lib",
    "lib64",
    "mnt",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
    "var",
)


def check_disks(disk: DiskWanted) -> Iterator[tuple[tuple[str, str], str]]:
    """What contradicts itself in the wishes for disks, before any disk was seen."""
    if disk.mirror and disk.filesystem != "btrfs":
        yield ("disk", "mirror"), 'disk.mirror needs disk.filesystem = "btrfs", whose RAID1 it is'
    if disk.mirror and disk.mirror == disk.serial:
        yield ("disk", "mirror"), "disk.mirror is disk.serial: a mirror needs a second disk"
    if disk.root_gib and disk.filesystem == "btrfs":
        yield (
            ("disk", "root_gib"),
            "disk.root_gib is for ext4: with btrfs /home is a subvolume that shares the space",
        )
    if 0 < disk.root_gib < 8:
        yield (
            ("disk", "root_gib"),
            f"disk.root_gib is {disk.root_gib}; a system with CUDA needs 8 at the very least",
        )
    if disk.swap == "file" and disk.mirror:
        yield (
            ("disk", "swap"),
            "a swap file cannot lie on a mirror (btrfs RAID1): disk.swap may be zram, partition or none",
        )
    if disk.encryption == "luks" and not disk.passphrase:
        yield (
            ("disk", "passphrase"),
            "disk.encryption is luks, and disk.passphrase says no passphrase: " + HOW,
        )
    if disk.encryption == "luks" and not disk.unlock:
        yield (
            ("disk", "unlock"),
            "disk.encryption is luks and disk.unlock says nothing: after every boot the machine would wait for a "
            "passphrase that nobody types. Expected tpm2, ssh, or console where somebody sits there",
        )
    if disk.unlock == "ssh" and disk.mirror:
        yield (
            ("disk", "unlock"),
            'disk.unlock = "ssh" opens one disk; with disk.mirror it may be tpm2 or console',
        )
    if disk.encryption == "none" and (disk.unlock or disk.passphrase):
        yield ("disk", "encryption"), 'disk.unlock and disk.passphrase are for disk.encryption = "luks"'
    serials, folders = (
        [disk.serial, disk.mirror],
        ["/home"] if disk.root_gib or disk.filesystem == "btrfs" else [],
    )
    for serial, folder in disk.data_disks:
        if serial in serials:
            yield ("disk", "data"), f"disk.data: {serial} is used twice"
        if folder in folders or folder.split("/")[1] in SYSTEM_FOLDERS or ".." in folder.split("/"):
            yield (
                ("disk", "data"),
                f"disk.data: {folder} is taken, or belongs to the system; a good place is /data",
            )
        serials.append(serial)
        folders.append(folder)


def hostname_rule() -> Rule:
    rule = settings()["system"]["hostname"].rule
    assert isinstance(rule, Rule)
    return rule


def at_address(machine: Machine, address: str) -> Machine:
    """The same machine, answering somewhere else; ProvisionError where that is no address."""
    for problem in check_value("The address", address, settings()["ssh"]["address"]):
        raise ProvisionError(f"{problem}.", f"fab -H {machine.name} … --address ADDRESS")
    return dataclasses.replace(machine, ssh=dataclasses.replace(machine.ssh, address=address))


def keep_address(machine: Machine, folder: Path, address: str) -> Machine:
    """The same machine at that address, from now on: it is kept in `NAME.local.toml`."""
    moved = at_address(machine, address)
    save_local(folder, machine.name, "ssh", "address", address)
    return moved


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
            *(f"{render_key(setting)} = {render_value(wanted)}" for setting, wanted in settings.items()),
        ]
    staged = path.with_suffix(".partial")
    staged.write_text("\n".join(lines) + "\n")
    staged.replace(path)
