"""Machine files: what they may say, and how they are told that they may not."""

import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from provision.errors import ProvisionError
from provision.layers import locate_keys, render_value
from provision.machine import PACKAGED_DEFAULTS, Machine, Ssh, load_machine, save_local
from tests.provision.conftest import KEY, machine_folder

GOOD = f'[disk]\nserial = "X"\n[user]\nauthorized_keys = ["{KEY}"]\n'


def error_of(folder: Path, text: str) -> str:
    with pytest.raises(ProvisionError) as caught:
        load_machine("gpu1", machine_folder(folder, text))
    return caught.value.message


def error_of_bytes(folder: Path, data: bytes) -> str:
    (folder / "gpu1.toml").write_bytes(data)
    with pytest.raises(ProvisionError) as caught:
        load_machine("gpu1", folder)
    return caught.value.message


def test_defaults_name_every_setting_and_no_other() -> None:
    documented = tomllib.loads(PACKAGED_DEFAULTS.read_text())
    hints = get_type_hints(Machine)
    known = {name: {f.name for f in fields(kind)} for name, kind in hints.items() if is_dataclass(kind)}
    assert {section: set(table) for section, table in documented.items()} == known


def test_environment_defaults_are_what_the_workload_needs() -> None:
    """The packages of a host's environment are those that pyproject.toml asks for; they stand in both files."""
    project = tomllib.loads((PACKAGED_DEFAULTS.parent.parent / "pyproject.toml").read_text())
    wanted = project["project"]["optional-dependencies"]["workload"]
    documented = tomllib.loads(PACKAGED_DEFAULTS.read_text())["python"]
    assert sorted(documented["packages"]) == sorted(line for line in wanted if not line.startswith("torch>"))


def test_layers_overlay_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "defaults.toml").write_text('[system]\ntimezone = "Europe/Berlin"\nkeymap = "de"\n')
    (tmp_path / "gpu1.local.toml").write_text('[ssh]\naddress = "192.168.1.7"\n')
    machine = load_machine("gpu1", machine_folder(tmp_path, GOOD + '[system]\nkeymap = "fr"\n'))
    assert machine.system.timezone == "Europe/Berlin"
    assert machine.system.keymap == "fr"
    assert machine.ssh.address == "192.168.1.7"
    assert machine.system.hostname == "gpu1"
    assert machine.disk.filesystem == "ext4"


def test_every_error_at_once_with_file_line_and_suggestion(tmp_path: Path) -> None:
    text = '[disk]\nserial = 7\nesp_mb = 3\n\n[sytem]\nhostname = "a"\n\n[python]\noffline = "no"\npackages = "numpy"\n'
    message = error_of(tmp_path, text)
    path = tmp_path / "gpu1.toml"
    assert message.splitlines() == [
        "5 error(s) in the files of machine 'gpu1':",
        f"  {path}:2: disk.serial must be a string, not int 7",
        f"  {path}:3: unknown key 'esp_mb' in [disk]; did you mean 'esp_mib'?",
        f"  {path}:5: unknown section [sytem]; did you mean 'system'?",
        f"  {path}:9: python.offline must be true or false, not str 'no'",
        f"  {path}:10: python.packages must be a list of strings, not str 'numpy'",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('[system]\nhostname = "a b"', ":6: system.hostname is 'a b'"),
        ('[system]\npackages = ["vim", "-evil"]', ":6: system.packages: '-evil' is not a package name"),
        ('[mirror]\nservers = ["ftp://x"]', ":6: mirror.servers: 'ftp://x' is not a URL with $repo"),
        ("[ssh]\nport = 0", ":6: ssh.port is 0"),
        ("[python]\noffline = true", ":6: python.offline is true"),
        ('[system]\ncmdline = "a\\nb"', ":6: system.cmdline"),
        (
            '[system]\ntimezone = "Europe/Berlim"',
            "system.timezone 'Europe/Berlim' is unknown; did you mean 'Europe/Berlin'?",
        ),
        ("[ssh]\nport = true", ":6: ssh.port must be a whole number, not bool True"),
    ],
)
def test_values_are_checked(tmp_path: Path, line: str, expected: str) -> None:
    assert expected in error_of(tmp_path, GOOD + line + "\n")


def test_missing_serial_and_unreadable_key_are_one_error(tmp_path: Path) -> None:
    message = error_of(tmp_path, '[user]\nauthorized_keys = ["~/no-such-file.pub"]\n')
    assert "disk.serial is missing" in message
    assert "gpu1.toml:2: '~/no-such-file.pub' is neither a public key line nor a file" in message


def test_keys_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "id.pub").write_text(KEY + "\n")
    machine = load_machine(
        "gpu1",
        machine_folder(tmp_path, f'[disk]\nserial = "X"\n[user]\nauthorized_keys = ["{tmp_path}/id.pub"]\n'),
    )
    assert machine.user.authorized_keys == (KEY,)


def test_a_key_that_was_cut_is_no_key(tmp_path: Path) -> None:
    text = '[disk]\nserial = "X"\n[user]\nauthorized_keys = ["ssh-ed25519 ' + "A" * 68 + '"]\n'
    assert "is neither a public key line nor a file" in error_of(tmp_path, text)


def test_a_name_that_cannot_be_an_alias_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match="cannot be a machine's name"):
        load_machine("a b", machine_folder(tmp_path, GOOD, "a b"))


def test_unknown_machine_names_the_near_one(tmp_path: Path) -> None:
    machine_folder(tmp_path, GOOD, "tower")
    with pytest.raises(ProvisionError, match="Did you mean 'tower'"):
        load_machine("towr", tmp_path)


def test_broken_toml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "gpu1.toml"
    assert f"{path}:1: not valid TOML" in error_of(tmp_path, "[disk\n")
    assert f"{path}:2: not valid TOML: byte 7 is not UTF-8" in error_of_bytes(tmp_path, b"[disk]\n\xff")
    assert f"{path}:1: not valid TOML" in error_of(tmp_path, 'extends = [\n"a",\n"b",\n')


def test_a_value_that_does_not_end_is_named_where_it_begins(tmp_path: Path) -> None:
    text = f'[system]\npackages = [\n  "htop",\n{GOOD}'
    assert "gpu1.toml:2: not valid TOML: Invalid value, noticed on line 4" in error_of(tmp_path, text)


def test_files_extend_others_and_later_ones_win(tmp_path: Path) -> None:
    machine_folder(tmp_path, '[system]\nkeymap = "base"\nlocale = "de_DE.UTF-8"\n[ssh]\nport = 1\n', "base")
    machine_folder(tmp_path, 'extends = "base"\n[system]\nkeymap = "desk"\ntimezone = "UTC"\n', "desktop")
    machine_folder(tmp_path, 'extends = ["base"]\n[ssh]\nport = 2\n[train]\nfolder = "own"\n', "lab")
    text = f'extends = ["desktop", "lab"]\n{GOOD}[train]\nfolder = "mine"\n'
    machine = load_machine("gpu1", machine_folder(tmp_path, text))
    assert machine.system.keymap == "desk"  # base comes once, below desktop
    assert machine.system.locale == "de_DE.UTF-8"
    assert machine.ssh.port == 2
    assert machine.train.folder == "mine"


def test_an_error_is_located_in_the_file_that_wrote_the_value(tmp_path: Path) -> None:
    machine_folder(tmp_path, "# a layer\n[ssh]\nport = 70000\n", "base")
    machine_folder(tmp_path, '[user]\n\nauthorized_keys = ["nothing"]\n', "keys")
    assert error_of(tmp_path, 'extends = "base"\n[disk]\nserial = "X"\n').splitlines() == [
        "1 error(s) in the files of machine 'gpu1':",
        f"  {tmp_path}/base.toml:3: ssh.port is 70000; expected 1 to 65535",
    ]
    assert f"{tmp_path}/keys.toml:3: 'nothing' is neither" in error_of(
        tmp_path, 'extends = "keys"\n[disk]\nserial = "X"\n'
    )


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (
            '"bass"',
            "gpu1.toml:2: extends names a file that is not there: {folder}/bass.toml; did you mean 'base'?",
        ),
        ('"../base"', "gpu1.toml:2: extends names a file that is not there: the name '../base'"),
        ('"gpu1"', "gpu1.toml:2: extends goes in a circle: gpu1 → gpu1"),
        ('"round"', "there.toml:1: extends goes in a circle: round → there → round"),
        ('["base", "base"]', "gpu1.toml:2: extends names 'base' twice"),
        ('"defaults"', "gpu1.toml:2: extends names 'defaults', which every machine has anyway"),
        ("7", "gpu1.toml:2: extends must be a name or a list of names"),
        ('["base", 7]', "gpu1.toml:2: extends must be a name or a list of names"),
        ('"broken"', "broken.toml:1: not valid TOML"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, wanted: str, expected: str) -> None:
    machine_folder(tmp_path, "", "base")
    machine_folder(tmp_path, 'extends = "there"\n', "round")
    machine_folder(tmp_path, 'extends = ["round"]\n', "there")
    machine_folder(tmp_path, "[disk\n", "broken")
    message = error_of(tmp_path, f"# a machine\nextends = {wanted}\n{GOOD}")
    assert expected.format(folder=tmp_path) in message
    assert message.startswith("1 error(s)")


def test_only_a_machines_own_file_extends(tmp_path: Path) -> None:
    machine_folder(tmp_path, "", "base")
    (tmp_path / "gpu1.local.toml").write_text('extends = "base"\n')
    assert "gpu1.local.toml:1: 'extends' belongs in a machine's own file" in error_of(tmp_path, GOOD)


@pytest.mark.parametrize(
    ("text", "keys", "line"),
    [
        ('[a]\nb = """\n[c]\nd = 1\n"""\n[c]\nd = 2\n', ("c", "d"), 7),
        ("[a]\nb = [\n  1,\n  2,\n]\nc = 1\n", ("a", "c"), 6),
        ('["a"]\n"b c".d = 1\n', ("a", "b c", "d"), 2),
        ("a = { b = 1, c = 2 }\n", ("a", "c"), 1),
        ("a.b = 1\n", ("a", "b"), 1),
        ("[[a]]\nb = 1\n[[a]]\nb = 2\n", ("a", "b"), 2),
        ("a = 1 # [b]\r\n\r\n[b]\r\nc = 1\r\n", ("b", "c"), 4),
        ('# \u2028 [b]\na = "\u2028"\n[b]\n', ("b",), 3),
    ],
)
def test_lines_of_keys(text: str, keys: tuple[str, ...], line: int) -> None:
    assert locate_keys(text)[keys] == line


def test_local_settings_survive_being_written(tmp_path: Path) -> None:
    name = 'quote " back \\ tab \t bell \x07 del \x7f rocket \U0001f680'
    (tmp_path / "gpu1.local.toml").write_text(
        f"[ssh]\nidentity = {render_value(name)}\nport = 23\n[python]\noffline = false\n"
    )
    save_local(tmp_path, "gpu1", "ssh", "address", "192.168.1.7")
    machine = load_machine("gpu1", machine_folder(tmp_path, GOOD))
    assert machine.ssh == Ssh("192.168.1.7", 23, name)
