"""The virtual machine that a machine file describes; values only. The real one is in test_own_machine.py."""

from pathlib import Path

import pytest

from provision.machine import Machine, load_machine
from provision.rehearsal import packages
from provision.rehearsal.bed import load_example
from provision.rehearsal.likeness import StandIns, liken
from tests.provision.conftest import KEY, machine_folder

BASE = f'[user]\nauthorized_keys = ["{KEY}"]\n'


def load(folder: Path, text: str) -> Machine:
    return load_machine("box1", machine_folder(folder, BASE + text, "box1"))


def test_disks_have_the_serials_and_sizes_of_the_file(tmp_path: Path) -> None:
    likeness = liken(
        load(
            tmp_path,
            '[disk]\nserial = "S6XYN"\nsize_gib = 1863\nmirror = "S7ABC"\nfilesystem = "btrfs"\n'
            'data = ["ata-WDC_WD40-68AX9N0_WD-1 /archive", "0123456789-0123456789 /old"]\n',
        ),
        load_example(),
        set(),
    )
    assert [(disk.serial, disk.size_gib) for disk in likeness.disks] == [
        ("S6XYN", 1863),
        ("S7ABC", 1863),
        ("REHEARSAL2", 64),
        ("REHEARSAL3", 64),
    ]
    assert "disk ata-WDC_WD40-68AX9N0_WD-1 is called REHEARSAL2" in likeness.differences


def test_what_it_becomes_is_a_machine_file_over_the_persons_own(tmp_path: Path) -> None:
    """As `Bed.write_machine_files` stacks them; the wishes of the person stay but for what is said to differ."""
    text = '[disk]\nserial = "nvme-X_1"\ndata = ["D1 /data"]\n[system]\ncmdline = "iommu=pt"\nkeymap = "de"\n'
    likeness = liken(load(tmp_path, text), load_example(), set())
    (tmp_path / "below-0.toml").write_text((tmp_path / "box1.toml").read_text())
    (tmp_path / "box1.toml").write_text(f'extends = ["below-0"]\n\n{likeness.wishes}')
    (tmp_path / "box1.local.toml").write_text('[python]\nfind_links = "http://127.0.0.1/"\n')
    found = load_machine("box1", tmp_path)
    assert (found.disk.serial, found.disk.data) == ("REHEARSAL0", ("D1 /data",))
    assert found.system.cmdline.startswith("iommu=pt console=ttyS0 ")
    assert found.system.keymap == "de"
    assert found.gpu.driver == "open"
    assert found.python.torch == load_example().python.torch


@pytest.mark.parametrize(("unlock", "tpm"), [("tpm2", True), ("console", False)])
def test_a_disk_that_a_tpm_opens_has_one(tmp_path: Path, unlock: str, tpm: bool) -> None:
    text = f'[disk]\nserial = "A"\nencryption = "luks"\npassphrase = "env:X"\nunlock = "{unlock}"\n'
    assert liken(load(tmp_path, text), load_example(), set()).tpm == tpm


def test_packages_that_the_bed_has_not_are_stood_in_for(tmp_path: Path) -> None:
    text = (
        '[disk]\nserial = "A"\n[system]\npackages = ["tmux", "fish"]\ngroups = ["gnome"]\n'
        '[packages]\nmine = ["docker"]\n[units]\n"docker.service" = "enabled"\n"x.timer" = "masked"\n'
        '[users.guest]\ngroups = ["video", "docker"]\n'
    )
    likeness = liken(load(tmp_path, text), load_example(), {"tmux"})
    assert likeness.stand_ins == StandIns(("docker", "fish"), ("gnome",), ("docker.service",), ("docker",))
    assert any("docker, fish, gnome" in difference for difference in likeness.differences)


def test_nothing_to_stand_in_for_is_no_stage(tmp_path: Path) -> None:
    assert not liken(load(tmp_path, '[disk]\nserial = "A"\n'), load_example(), set()).stand_ins


def test_stand_ins_bring_the_units_that_the_system_has_not() -> None:
    wanted = StandIns(("docker",), ("gnome",), ("docker.service", "fstrim.timer", "mine.timer"), ("docker",))
    docker, gnome = packages.do_nothing(wanted, ["fstrim.timer"])
    assert gnome.groups == ("gnome",)
    units = {place.rpartition("/")[2] for place in docker.extra if "systemd" in place}
    assert units == {"docker.service", "mine.timer", "mine.service"}
    assert "groupadd --system --force docker" in docker.install
    assert "group = gnome\n" in packages.pkginfo(gnome, 1)
