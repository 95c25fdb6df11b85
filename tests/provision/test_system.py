"""The whole system as planned: golden Steps for two hosts, and every refusal before anything is touched."""

import os
import re
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from pytest_mock import MockerFixture
from rich.console import Console

from provision.errors import ProvisionError
from provision.facts import Disk, Facts, Partition
from provision.flow import authorise_wipe, converge, demand_way_in
from provision.machine import Machine
from provision.steps import Packages, Step, render_apply, render_probes
from provision.steps import make_plan as plan_of
from provision.system import system
from provision.system.disk import make_filesystem, would_lose
from provision.system.layout import layout
from tests.provision.conftest import KEY, with_target

GOLDEN = Path(__file__).parent / "golden"
NOW = 1800000000


def render(steps: list[Step]) -> str:
    """Steps as text for the golden files; contents of files in clear."""
    parts = []
    for step in steps:
        script = re.sub(r"<<< '[A-Za-z0-9+/=]*'", "<<< CONTENT", step.script)
        then = f"\nthen:\n{step.then}" if step.then else ""
        parts.append(
            f"=== {step.name}\nwhy: {step.why}\nprobe:\n{step.probe}\nexpect:\n{step.expect}\nscript:\n{script}{then}\n"
        )
    return "\n".join(parts)


def installed(machine: Machine, live: Facts) -> Facts:
    """The same host after the installation."""
    ids = layout(machine)
    disks = [
        replace(
            disk,
            partitions=tuple(
                Partition("", 0, "", "", part.type_guid, part.uuid, part.name, ())
                for part in ids.on(disk.serial)
            )
            or disk.partitions,
        )
        for disk in live.disks
    ]
    facts = replace(live, system="installed", owner="gpu1", hostname="gpu1", root_partitions=tuple(ids.roots))
    return with_target(replace(facts, disks=tuple(disks)), mounted=("/", "/boot"))


@pytest.mark.parametrize("system_name", ["live", "installed"])
def test_golden_steps(machine: Machine, live: Facts, system_name: str) -> None:
    facts = live if system_name == "live" else installed(machine, live)
    golden = GOLDEN / f"{system_name}.txt"
    rendered = render(system(machine, facts, NOW))
    if "UPDATE_GOLDEN" in os.environ:  # then read the difference, line by line
        golden.write_text(rendered)
    assert rendered == golden.read_text()


@pytest.mark.parametrize("system_name", ["live", "installed"])
def test_what_is_rendered_is_bash(machine: Machine, live: Facts, system_name: str) -> None:
    facts = live if system_name == "live" else installed(machine, live)
    steps = system(machine, facts, NOW)
    plan = plan_of("", steps, [("?", True)] * len(steps))
    scripts = [render_probes(steps, "/mnt", layout(machine).probe_mounts), render_apply(plan, "/mnt")]
    scripts += (
        [step.script for step in steps] + [step.probe for step in steps] + [step.then for step in steps]
    )
    for script in scripts:
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr + script


def test_a_wrong_clock_is_set_only_when_it_is_wrong(machine: Machine, live: Facts) -> None:
    assert not any(step.name == "clock" for step in system(machine, live, NOW + 59))
    clock = next(step for step in system(machine, live, NOW + 3600 * 24 * 400) if step.name == "clock")
    assert f"$(date +%s) + {3600 * 24 * 400}" in clock.script


def test_ids_are_the_machine_and_disk(machine: Machine) -> None:
    assert layout(machine) == layout(machine)
    assert layout(machine) != layout(replace(machine, name="gpu2"))
    assert layout(machine) != layout(replace(machine, disk=replace(machine.disk, serial="other")))


def test_no_two_disks_no_missing_disk_no_medium(machine: Machine, live: Facts) -> None:
    with pytest.raises(ProvisionError, match=r"No disk with serial 'S4EWNX0R'(.|\n)*STICK1"):
        system(machine, replace(live, disks=live.disks[1:]), NOW)
    with pytest.raises(ProvisionError, match="belongs to 2 disks"):
        system(
            machine, replace(live, disks=(live.disks[0], replace(live.disks[0], path="/dev/nvme1n1"))), NOW
        )
    stick = replace(machine, disk=replace(machine.disk, serial="STICK1"))
    with pytest.raises(ProvisionError, match="is the install medium"):
        system(stick, live, NOW)
    with pytest.raises(ProvisionError, match="too small"):
        system(machine, with_target(live, size_bytes=2**30), NOW)
    with pytest.raises(ProvisionError, match="in use: /mnt/data"):
        system(machine, with_target(live, mounted=("/mnt/data",)), NOW)


def test_hosts_that_are_not_ours_are_refused(machine: Machine, live: Facts) -> None:
    with pytest.raises(ProvisionError, match="archiso runs debian, and is neither"):
        system(machine, replace(live, system="other", os="debian"), NOW)
    with pytest.raises(ProvisionError, match="booted by a BIOS"):
        system(machine, replace(live, uefi=False), NOW)
    with pytest.raises(ProvisionError, match="installed as machine 'tower'"):
        system(machine, replace(installed(machine, live), owner="tower"), NOW)
    with pytest.raises(ProvisionError, match="runs from partition abc"):
        system(machine, replace(installed(machine, live), root_partitions=("abc",)), NOW)


def windows(disk: Disk) -> dict[str, object]:
    return {
        "partitions": (
            Partition(f"{disk.path}p1", 500 * 2**30, "ntfs", "Windows", "x", "y", "Basic data", ()),
        )
    }


def test_a_foreign_disk_needs_its_serial(machine: Machine, live: Facts) -> None:
    foreign = with_target(live, **windows(live.disks[0]))
    assert "ntfs Windows Basic data" in would_lose(machine, foreign)
    with pytest.raises(ProvisionError, match="not ours; nothing was changed") as caught:
        authorise_wipe(machine, foreign, "", ask=lambda _: "", console=Console(quiet=True))
    assert "fab -H gpu1 provision --wipe=S4EWNX0R" in caught.value.hint
    with pytest.raises(ProvisionError, match="is not the disk of machine"):
        authorise_wipe(machine, foreign, "STICK1", ask=lambda _: "", console=Console(quiet=True))
    with pytest.raises(ProvisionError):
        authorise_wipe(machine, foreign, "", ask=lambda _: "yes", console=Console(quiet=True))
    authorise_wipe(machine, foreign, "S4EWNX0R", ask=lambda _: "", console=Console(quiet=True))
    authorise_wipe(machine, foreign, "", ask=lambda _: "S4EWNX0R", console=Console(quiet=True))
    authorise_wipe(machine, live, "", ask=lambda _: "", console=Console(quiet=True))  # blank


def test_our_own_disk_loses_nothing(machine: Machine, live: Facts) -> None:
    ours = replace(installed(machine, live), system="live")
    assert would_lose(machine, ours) == ""
    theirs = replace(machine, name="other")
    assert would_lose(theirs, ours) != ""


def test_a_partition_that_the_person_added_is_kept_and_none_is_asked_for(
    machine: Machine, live: Facts
) -> None:
    ours = replace(installed(machine, live), system="live")
    scratch = Partition("/dev/nvme0n1p3", 2**30, "xfs", "scratch", "x", "y", "", ())
    assert would_lose(machine, with_target(ours, partitions=(*ours.disks[0].partitions, scratch))) == ""


def test_a_file_system_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    device = tmp_path / "partition"
    device.touch()
    os.truncate(device, 64 << 20)
    ident = str(uuid.uuid4())
    steps = {
        name: make_filesystem(name, (str(device),), name, ident, f"mkfs.{name} -q -U {ident}")
        for name in ("ext4", "btrfs")
    }

    def bash(script: str) -> subprocess.CompletedProcess[str]:
        script = f"udevadm() {{ :; }}\n{script}"  # a file has no device events to wait for
        return subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True)

    assert bash(steps["ext4"].script).returncode == 0
    assert steps["ext4"].is_done(bash(steps["ext4"].probe).stdout)
    before = device.read_bytes()
    refused = bash(steps["btrfs"].script)
    assert refused.returncode == 1
    assert f"expected nothing, or our btrfs, on {device}; there is:\next4 {ident}\n" in refused.stdout
    assert device.read_bytes() == before


def test_what_disturbs_a_training_waits_for_it(machine: Machine, live: Facts, mocker: MockerFixture) -> None:
    plan = plan_of("", [Packages("tmux", why="")], [("tmux", False)])
    mocker.patch("provision.flow.plan_for", return_value=plan)
    apply = mocker.patch("provision.flow.apply")
    busy = replace(installed(machine, live), runs=("a",))
    with pytest.raises(ProvisionError, match=r"^a is at work"):
        converge(machine, busy, mocker.Mock(), Console(quiet=True), lambda: None)
    apply.assert_not_called()


def test_an_install_that_locks_this_computer_out_is_refused(machine: Machine, mocker: MockerFixture) -> None:
    host = mocker.Mock()
    mocker.patch("provision.flow.own_keys", return_value={" ".join(KEY.split()[:2])})
    demand_way_in(machine, host)
    mocker.patch("provision.flow.own_keys", return_value=set())
    with pytest.raises(ProvisionError, match="could not log in"):
        demand_way_in(machine, host)


def test_the_shell_comes_with_its_package(machine: Machine, live: Facts) -> None:
    zsh = replace(machine, user=replace(machine.user, shell="/usr/bin/zsh"))
    shells = {
        facts.system: next(step for step in system(zsh, facts, NOW) if step.name == "user ml").expect.split()[
            0
        ]
        for facts in (live, installed(machine, live))
    }
    assert shells == {"live": "/bin/bash", "installed": "/usr/bin/zsh"}
