"""A valid machine file, broken in some hundred ways: each time one readable error with file and line, nothing else.

The mutations are generated: from the settings, their types and their rules, and from every line of the file.
"""

import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from provision.errors import ProvisionError
from provision.layers import render_value
from provision.machine import PACKAGED_DEFAULTS, Between, Rule, load_machine, settings
from provision.secrets import Secret
from tests.provision.conftest import KEY

LITERAL = "correct horse battery staple"  # a secret where a reference is expected


def valid_lines() -> list[str]:
    """A machine file that says everything: the defaults, with what they leave to the person."""
    values = tomllib.loads(PACKAGED_DEFAULTS.read_text())
    values["disk"]["serial"] = "S4EWNX0R"
    values["user"] |= {"authorized_keys": [KEY], "password": "env:PASSWORD"}
    lines = ['extends = ["base"]']
    for section, table in values.items():
        lines += [f"[{section}]", *(f"{key} = {render_value(value)}" for key, value in table.items())]
    return lines


LINES = valid_lines()
NUMBER = {}  # (section, key) → its line, counted from 1
SECTION = ""
for _number, _line in enumerate(LINES, 1):
    if _line.startswith("["):
        SECTION = _line.strip("[]")
        NUMBER[(SECTION, "")] = _number
    else:
        NUMBER[(SECTION, _line.split(" = ")[0])] = _number


@dataclass(frozen=True)
class Mutation:
    name: str
    content: bytes
    line: int  # of the error; 0 where it belongs to the file as a whole
    file: str = "gpu1.toml"


def change(name: str, number: int, *instead: str, line: int = 0) -> Mutation:
    """The file with other lines in place of line `number`; the error is expected there, or at `line`."""
    lines = [*LINES[: number - 1], *instead, *LINES[number:]]
    return Mutation(name, "".join(f"{text}\n" for text in lines).encode(), line or number)


def misspell(word: str) -> Iterator[str]:
    yield word[:-1] + ("x" if word[-1] != "x" else "y")
    yield word + word[-1]
    yield word[1:] or "q"
    yield word.upper()
    yield word.replace("_", "-") if "_" in word else f"{word}_"


def misspelt() -> Iterator[Mutation]:
    for (section, key), number in NUMBER.items():
        if section and not key:
            for wrong in misspell(section):
                yield change(f"[{wrong}] for [{section}]", number, f"[{wrong}]")
        elif section:
            value = LINES[number - 1].split(" = ", 1)[1]
            for wrong in misspell(key):
                yield change(f"{section}.{wrong} for {key}", number, f"{wrong} = {value}")


WRONG_TYPES = {
    "str": '"text"', "int": "7", "bool": "true", "float": "0.5", "date": "2026-11-23", "list": '["text"]',
    "numbers": "[1, 2]", "mixed": '["a", 1]', "table": "{ a = 1 }", "nested": '[["a"]]', "infinite": "inf",
}  # fmt: skip
RIGHT = {str: "str", Secret: "str", int: "int", bool: "bool", tuple[str, ...]: "list"}


def wrongly_typed() -> Iterator[Mutation]:
    for section, known in settings().items():
        for key, setting in known.items():
            for kind, text in WRONG_TYPES.items():
                if kind != RIGHT[setting.kind]:
                    yield change(f"{section}.{key} a {kind}", NUMBER[(section, key)], f"{key} = {text}")
        for kind in ("int", "str", "list"):
            yield Mutation(f"{section} a {kind}", f"{section} = {WRONG_TYPES[kind]}\n".encode(), 1)
        header = NUMBER[(section, "")]
        yield change(f"[[{section}]]", header, f"[[{section}]]")


ODD = ("", " ", "\n", "a\nb", "-o", "\x00", "ü", "*", "/", "a b", "$(reboot)", "'; reboot #", "x" * 5000)


def against_their_rule() -> Iterator[Mutation]:
    """Whatever a rule refuses of some odd strings, and numbers beyond each end."""
    for section, known in settings().items():
        for key, setting in known.items():
            number = NUMBER[(section, key)]
            if isinstance(setting.rule, Between):
                for value in (setting.rule.least - 1, setting.rule.greatest + 1, -1, 2**63):
                    yield change(f"{section}.{key} {value}", number, f"{key} = {value}")
            elif isinstance(setting.rule, Rule):
                for odd in (LITERAL, *ODD) if setting.kind is Secret else ODD:
                    if not re.fullmatch(setting.rule.pattern, odd):
                        value = [odd] if setting.kind == tuple[str, ...] else odd
                        text = f"{key} = {render_value(value)}"
                        yield change(f"{section}.{key} {odd[:20]!r}", number, text)


def duplicated() -> Iterator[Mutation]:
    for (section, key), number in NUMBER.items():
        line = LINES[number - 1]
        if key:
            yield change(f"{section}.{key} twice", number, line, line, line=number + 1)
        else:
            end = len(LINES) + 1
            yield Mutation(f"[{section}] twice", "".join(f"{x}\n" for x in [*LINES, line]).encode(), end)


def torn() -> Iterator[Mutation]:
    """Lines that lost a character without which they are no TOML."""
    for number, line in enumerate(LINES, 1):
        for lost in ("=", "]", '"', "["):
            at = line.rfind(lost) if lost != "[" else line.find(lost)
            whole = line[:at] + line[at + 1 :]
            if at >= 0 and not is_toml(whole):
                yield change(f"line {number} without {lost}", number, whole)
        if " = " in line:
            yield change(f"line {number} without value", number, line.split("=")[0] + "=")


def is_toml(line: str) -> bool:
    try:
        tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return False
    return True


# Beside the machine's file: name → (content, line of its error)
LAYERS = {
    "base": ("[system]\nkeymap = 'de'\n", 0),
    "broken": ("# a layer\n[disk\n", 2),
    "round": ("extends = 'round'\n", 1),
    "wrong": ("[ssh]\n\nport = 0\n", 3),
}


def extended() -> Iterator[Mutation]:
    wrong = [
        '"nobody"',
        '["base", "nobody"]',
        '"gpu1"',
        '["base", "base"]',
        '"defaults"',
        '"../base"',
        '"/etc/x"',
        '""',
    ]
    wrong += [
        "7",
        "true",
        "[1]",
        '[["base"]]',
        "{ base = 1 }",
        '"base.toml"',
        '"gpu1.local"',
        '"bäse"',
        '"a/b"',
        '"\\u0000"',
    ]
    for value in wrong:
        yield change(f"extends {value}", 1, f"extends = {value}")
    yield Mutation("extends below a section", b"[disk]\nextends = 'base'\nserial = 'X'\n", 2)
    for name, (_, line) in LAYERS.items():
        if line:
            mutation = change(f"extends the {name} one", 1, f'extends = ["base", "{name}"]', line=line)
            yield replace(mutation, file=f"{name}.toml")


def missing() -> Iterator[Mutation]:
    yield change("no serial", NUMBER[("disk", "serial")], 'serial = ""')
    yield change("no keys", NUMBER[("user", "authorized_keys")], "authorized_keys = []")
    yield change("no mirror", NUMBER[("mirror", "servers")], "servers = []")
    yield change("a key that is none", NUMBER[("user", "authorized_keys")], 'authorized_keys = ["ssh-rsa"]')
    yield change("a file that is none", NUMBER[("user", "authorized_keys")], 'authorized_keys = ["~x/y.pub"]')
    yield change("offline without wheels", NUMBER[("python", "offline")], "offline = true")
    yield change("no such zone", NUMBER[("system", "timezone")], 'timezone = "Europe/Berlim"')
    yield change("root", NUMBER[("user", "name")], 'name = "root"')
    yield Mutation("everything deleted", b"", 0)
    without = [line for line in LINES if not line.startswith("serial")]
    yield Mutation("serial deleted", "\n".join(without).encode(), 0, "defaults.toml")


def garbage() -> Iterator[Mutation]:
    whole = "".join(f"{line}\n" for line in LINES).encode()
    yield Mutation("latin-1", b"[system]\n# gr\xfc\xdfe\n" + whole, 2)
    yield Mutation("utf-16", whole.decode().encode("utf-16"), 1)
    yield Mutation("byte order mark", b"\xef\xbb\xbf" + whole, 1)
    yield Mutation("zeroes", b"\0" * 4096, 1)
    yield Mutation("a program", b"\x7fELF\x02\x01\x01" + bytes(range(256)), 2)
    yield Mutation("JSON", b'{"disk": {"serial": "X"}}\n', 1)
    yield Mutation("YAML", b"disk:\n  serial: X\n", 1)
    yield Mutation("prose", b"This machine is mine.\n", 1)
    yield Mutation("nested too deep", b"a = " + b"[" * 100_000, 0)
    yield Mutation("a number too long", b"[ssh]\nport = " + b"9" * 5000, 0)
    for at in range(7, len(whole), 37):  # cut off; where what is left is TOML, something required is gone
        cut = whole[:at]
        if not is_toml(cut.decode()):
            yield Mutation(f"cut after {at} bytes", cut, cut.count(b"\n") + 1)


KINDS = [misspelt, wrongly_typed, against_their_rule, duplicated, torn, extended, missing, garbage]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, (content, _) in LAYERS.items():
        (tmp_path / f"{name}.toml").write_text(content)
    (tmp_path / "gpu1.local.toml").write_text('[ssh]\naddress = "192.168.1.7"\n')
    (tmp_path / "known_hosts").write_text("")
    return tmp_path


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def refusal(folder: Path) -> ProvisionError | None:
    try:
        load_machine("gpu1", folder)
    except ProvisionError as error:
        return error
    return None


def complaint(folder: Path, mutation: Mutation) -> str:
    """What is wrong with how this mutation is reported; "" where nothing is. Anything but a ProvisionError passes through."""
    (folder / "gpu1.toml").write_bytes(mutation.content)
    before = contents(folder)
    error = refusal(folder)
    if error:
        first, *problems = error.message.splitlines()
        where = f"  {folder / mutation.file}:{mutation.line}: "
        if not re.fullmatch(rf"{len(problems)} error\(s\) in the files of machine 'gpu1':", first):
            return f"not a line a problem: {error.message}"
        if not all(re.fullmatch(r"  /\S+\.toml(:\d+)?: .{10,400}", problem) for problem in problems):
            return f"unreadable: {error.message}"
        if mutation.line and not any(problem.startswith(where) for problem in problems):
            return f"expected {where.strip()} …, got {error.message}"
        if LITERAL in str(error) or not error.hint:
            return f"a secret shown, or no hint: {error}"
        return "" if contents(folder) == before else "the folder was changed"
    return "accepted"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_mutation_is_one_readable_error_and_nothing_is_touched(
    folder: Path, kind: Callable[[], Iterator[Mutation]]
) -> None:
    complaints = [(mutation.name, complaint(folder, mutation)) for mutation in kind()]
    assert not [pair for pair in complaints if pair[1]]
    assert len(complaints) >= 10


def test_there_are_many_and_the_file_they_come_from_is_valid(folder: Path) -> None:
    generated = [mutation for kind in KINDS for mutation in kind()]
    assert len({mutation.content for mutation in generated}) >= 200
    (folder / "gpu1.toml").write_text("".join(f"{line}\n" for line in LINES))
    assert load_machine("gpu1", folder).system.keymap == "us"


VALID = "".join(f"{line}\n" for line in LINES).encode()


@settings_of_hypothesis(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cut=st.integers(0, len(VALID)),
    length=st.integers(0, 40),
    instead=st.binary(max_size=12) | st.sampled_from([b"[", b"]]", b'"""', b"\n[disk]\n", b"= {", b"."]),
)
def test_any_damage_is_either_harmless_or_a_readable_error(
    folder: Path, cut: int, length: int, instead: bytes
) -> None:
    (folder / "gpu1.toml").write_bytes(VALID[:cut] + instead + VALID[cut + length :])
    error = refusal(folder)
    assert error is None or error.message.startswith(f"{len(error.message.splitlines()) - 1} error(s)")
