"""Machine files as layers: which files make a machine (`extends`), what each says, and on which line.

Pure but for `read_layer`, which reads one file, and `stack_layers`, which reads those that make a machine.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from provision.errors import ProvisionError
from provision.pins import ALIAS

EXTENDS = "extends"
DEFAULTS = "defaults"

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One file: its text, and what it says."""

    path: Path
    text: str
    values: dict[str, Any]

    @cached_property
    def lines(self) -> dict[Keys, int]:
        return locate_keys(self.text)

    def where(self, *keys: str) -> str:
        """`FILE:LINE` of a section's header or of a key in it; of what contains it where that has no line of its own."""
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return f"{self.path}:{self.lines[keys]}" if keys else str(self.path)


def locate_keys(text: str) -> dict[Keys, int]:
    """The line on which each table and key of a valid TOML document begins."""
    found: dict[Keys, int] = {}
    section: Keys = ()
    for number, statement, values in statements(text):
        paths = list(walk(values))
        if statement.lstrip().startswith("["):
            section = paths[-1]
        else:
            paths = [section + path for path in paths]
        for path in paths:
            found.setdefault(path, number)
    return found


def statements(text: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """A document cut into (first line, text, what that text alone says); what is no TOML to its end is said to be empty.

    Every header and every `key = value` is a TOML document of its own, so the parser itself says where one ends:
    after the first line that makes it whole. That holds for quoted and dotted keys, inline tables and values of
    several lines, which a search by pattern would misread.
    """
    pending, begun = "", 1
    # Not splitlines, which also splits at characters that TOML allows within a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not pending:
            begun = number
        pending += line + "\n"
        try:
            values = tomllib.loads(pending)
        except ValueError:
            continue
        yield begun, pending, values
        pending = ""
    if pending:
        yield begun, pending, {}


def walk(values: dict[str, Any], above: Keys = ()) -> Iterator[Keys]:
    """The path of every key, outer ones first. Of an array of tables the last one counts."""
    for key, value in values.items():
        yield (*above, key)
        inner = value[-1] if isinstance(value, list) and value else value
        if isinstance(inner, dict):
            yield from walk(inner, (*above, key))


def read_layer(path: Path) -> Layer:
    """One file. ProvisionError with file and line where it cannot be read or is not TOML."""
    try:
        text = path.read_bytes().decode()
        return Layer(path, text, tomllib.loads(text))
    except OSError as error:
        raise ProvisionError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ProvisionError(f"{path}:{line}: not valid TOML: byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ProvisionError(f"{path}: not valid TOML: nested too deep") from error
    except ValueError as error:  # TOMLDecodeError, and what Python says of a number with thousands of digits
        raise ProvisionError(explain(path, text, str(error))) from error


def explain(path: Path, text: str, error: str) -> str:
    """tomllib's message with the line in front; of a value that does not end, the line on which it begins."""
    what, _, at = error.partition(" (at ")
    if not at:
        return f"{path}: not valid TOML: {what}"
    named = re.match(r"line (\d+)", at)
    noticed = int(named[1]) if named else text.rstrip().count("\n") + 1
    *_, (begun, _, values) = statements("\n".join(text.split("\n")[:noticed]))
    if values or begun == noticed:
        return f"{path}:{noticed}: not valid TOML: {what}"
    return f"{path}:{begun}: not valid TOML: {what}, noticed on line {noticed}"


@dataclass
class Stack:
    """The layers of one machine, lowest first, and what is wrong with how they name each other."""

    folder: Path
    layers: list[Layer] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def read(self, path: Path) -> Layer | None:
        try:
            return read_layer(path)
        except ProvisionError as error:
            self.problems.append(error.message)
            return None

    def add_plain(self, path: Path) -> None:
        """A file that may not extend others."""
        if layer := self.read(path):
            if EXTENDS in layer.values:
                self.problems.append(f"{layer.where(EXTENDS)}: '{EXTENDS}' belongs in a machine's own file")
            self.layers.append(layer)

    def add_extended(self, name: str, above: tuple[str, ...] = ()) -> None:
        """`NAME.toml` on top of what it extends. A file that is met twice counts where it is met first."""
        path = self.folder / f"{name}.toml"
        if any(layer.path == path for layer in self.layers):
            return
        if layer := self.read(path):
            for wanted in self.extended_by(layer, (*above, name)):
                self.add_extended(wanted, (*above, name))
            self.layers.append(layer)

    def extended_by(self, layer: Layer, chain: tuple[str, ...]) -> Iterator[str]:
        """The names that a file extends and that may be followed; the others become problems."""
        value = layer.values.get(EXTENDS, [])
        names = [value] if isinstance(value, str) else value
        where = layer.where(EXTENDS)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self.problems.append(
                f'{where}: {EXTENDS} must be a name or a list of names, such as ["base", "desktop"]'
            )
            return
        known = extendable(self.folder)
        for index, name in enumerate(names):
            if name == DEFAULTS:
                self.problems.append(f"{where}: {EXTENDS} names 'defaults', which every machine has anyway")
            elif name in chain:
                circle = " → ".join([*chain[chain.index(name) :], name])
                self.problems.append(f"{where}: {EXTENDS} goes in a circle: {circle}")
            elif name in names[:index]:
                self.problems.append(f"{where}: {EXTENDS} names '{name}' twice")
            elif not ALIAS.fullmatch(name) or name not in known:
                wanted = f"{self.folder}/{name}.toml" if ALIAS.fullmatch(name) else f"the name {name!r}"
                self.problems.append(
                    f"{where}: {EXTENDS} names a file that is not there: {wanted}{nearest(name, known)}"
                )
            else:
                yield name


def extendable(folder: Path) -> list[str]:
    """The names that have a file in the folder, sorted: machines, and layers that machines extend."""
    names = (path.name.removesuffix(".toml") for path in folder.glob("*.toml"))
    return sorted(name for name in names if name != DEFAULTS and not name.endswith(".local"))


def stack_layers(name: str, folder: Path, packaged: Path) -> Stack:
    """The files of one machine, lowest first: the packaged defaults, the folder's, what it extends, its own, its local one.

    Files that do not exist are left out, the machine's own too.
    """
    stack = Stack(folder)
    stack.add_plain(packaged)
    defaults = folder / f"{DEFAULTS}.toml"
    if defaults.exists() and defaults.resolve() != packaged.resolve():
        stack.add_plain(defaults)
    if (folder / f"{name}.toml").exists():
        stack.add_extended(name)
    if (local := folder / f"{name}.local.toml").exists():
        stack.add_plain(local)
    return stack


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the one that was perhaps meant, else all there are."""
    listed = list(known)
    near = difflib.get_close_matches(name, listed, 1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(listed)}" if listed else ""


def render_key(key: str) -> str:
    """A key as TOML: bare where it may be."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else render_value(key)


def render_value(value: object) -> str:
    """A string, number, truth value, list or table of them as TOML, whose escapes are not quite JSON's."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return (
            f"{{ {', '.join(f'{render_key(key)} = {render_value(inner)}' for key, inner in value.items())} }}"
        )
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(render_value, value))}]"
    if isinstance(value, str):
        return '"' + "".join(map(escape_character, value)) + '"'
    return str(value)


def escape_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    if "\ud800" <= character <= "\udfff":  # half a character, which no file can hold
        return "\ufffd"
    return f"\\U{ord(character):08x}"
