"""The probe runs for real here; what it printed elsewhere is read from text."""

import subprocess
from pathlib import Path

import pytest

from provision.errors import ProvisionError
from provision.facts import HOLDINGS, PROBE, Facts, parse_facts
from tests.provision.conftest import PROBED_LIVE


def test_facts_of_a_live_iso(live: Facts) -> None:
    assert live.system == "live"
    assert live.uefi
    assert live.memory_bytes == 32768000 * 1024
    assert [(disk.path, disk.serial, disk.is_blank, disk.is_medium) for disk in live.disks] == [
        ("/dev/nvme0n1", "S4EWNX0R", True, False),
        ("/dev/sda", "STICK1", False, True),
    ]
    assert live.disks[1].in_use == ("/run/archiso/bootmnt",)
    assert [(gpu.slot, gpu.device) for gpu in live.gpus] == [("0000:01:00.0", 0x2684)]
    assert live.nics == (("enp5s0", "a8:a1:59:00:00:01"),)


def test_the_probe_runs_on_this_computer_and_changes_nothing() -> None:
    answer = subprocess.run(
        ["bash", "--norc", "-euo", "pipefail", "-c", PROBE],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/sbin:/usr/bin", "LC_ALL": "C"},
    )
    assert answer.returncode == 0, answer.stderr
    facts = parse_facts(answer.stdout)
    assert facts.system == "other"
    assert facts.clock_s > 1_700_000_000
    assert all(len(disk.holdings) == 64 for disk in facts.disks)


def test_trainings_at_work_are_called_by_the_names_of_their_runs(tmp_path: Path) -> None:
    """A mock of systemctl: no systemd runs here."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(
        "#!/bin/sh\n"
        '[ "$1" != list-units ] || for run in 20261124-101500-demo b.service; do\n'
        '  echo "metal-run-$run.service loaded active running Training"\ndone\n'
    )
    systemctl.chmod(0o755)
    answer = subprocess.run(
        ["bash", "--norc", "-euo", "pipefail", "-c", PROBE],
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:/usr/sbin:/usr/bin", "LC_ALL": "C"},
    )
    assert parse_facts(answer.stdout).runs == ("20261124-101500-demo", "b.service")


def test_a_cut_answer_is_refused() -> None:
    with pytest.raises(ProvisionError, match="incomplete"):
        parse_facts(PROBED_LIVE.replace("@end", ""))


def test_what_has_no_size_is_not_blank() -> None:
    """A card reader without a card, or a disk that was pulled out: the probe goes on."""
    script = (
        HOLDINGS + "if is_blank /dev/null 2> /dev/null; then echo blank; else echo something; fi; echo on"
    )
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "something\non\n"
