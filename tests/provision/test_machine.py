"""Machine files: what they may say, and how they are told that they may not."""

import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from provision.errors import ProvisionError
from provision.machine import PACKAGED_DEFAULTS, Machine, load_machine
from tests.provision.conftest import KEY, machine_folder

GOOD = f'[disk]\nserial = "X"\n[user]\nauthorized_keys = ["{KEY}"]\n'


def error_of(folder: Path, text: str) -> str:
    with pytest.raises(ProvisionError) as caught:
        load_machine("gpu1", machine_folder(folder, text))
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
        ('[system]\npackages = ["vim", "-evil"]', ":6: '-evil' is not a package name"),
        ('[mirror]\nservers = ["ftp://x"]', ":6: 'ftp://x' is not a URL with $repo"),
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
    assert "gpu1.toml is not valid TOML" in error_of(tmp_path, "[disk\n")
    assert "line 1" in error_of(tmp_path, "[disk\n")
