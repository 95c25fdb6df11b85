"""Update and rollback: what is refused, what is said. What they do to a disk: tests/rehearsal/test_update.py."""

import io
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from pytest_mock import MockerFixture
from rich.console import Console

from provision.errors import ProvisionError
from provision.facts import Facts
from provision.machine import Machine
from provision.snapshot import arm, downgrade, finish, go_back, note_packages, take_snapshot, upgrade
from provision.steps import make_plan, render_apply, render_probes
from provision.system import system
from provision.update import (
    MOST_SHOWN,
    Past,
    parse_past,
    render_changes,
    rollback_machine,
    taken_back_by,
    update_machine,
)
from tests.provision.test_system import NOW, installed

SAID = """\
title Arch Linux, as it was before the update of 2026-11-23
number 259
root 256
day 2026/11/20
updating
@now
linux-lts 6.12.2-1
new 1-1
same 1:2-3
@then
linux-lts 6.12.1-1
same 1:2-3
"""


def test_what_a_machine_knows_of_its_last_update() -> None:
    past = parse_past(SAID)
    assert past == Past(
        title="Arch Linux, as it was before the update of 2026-11-23", number="259", root="256", day="2026/11/20", updating="",
        now={"linux-lts": "6.12.2-1", "new": "1-1", "same": "1:2-3"}, then={"linux-lts": "6.12.1-1", "same": "1:2-3"},
    )  # fmt: skip
    assert render_changes(past.then, past.now).splitlines() == [
        "2 packages:",
        "  linux-lts  6.12.1-1 → 6.12.2-1",
        "  new  none → 1-1",
    ]
    assert render_changes(past.now, past.now) == "No package is of another version."
    many = {f"p{n}": "1" for n in range(MOST_SHOWN + 2)}
    assert render_changes({}, many).splitlines()[-1] == "  and 2 more"
    for end in ("@then", "@now", "updating"):
        with pytest.raises(ProvisionError, match="incomplete"):
            parse_past(SAID[: SAID.index(end)])


@pytest.fixture
def seen(machine: Machine, live: Facts, mocker: MockerFixture) -> Facts:
    """What update and rollback find; what they would do is recorded and not done."""
    facts = installed(machine, live)
    mocker.patch("provision.update.gather_facts", return_value=facts)
    mocker.patch("provision.update.apply", side_effect=AssertionError("something was changed"))
    return facts


@pytest.mark.parametrize("task", [update_machine, rollback_machine])
def test_a_run_at_work_is_not_disturbed(
    machine: Machine, seen: Facts, mocker: MockerFixture, task: type
) -> None:
    busy = replace(seen, runs=("a",))
    mocker.patch("provision.update.gather_facts", return_value=busy)
    with pytest.raises(ProvisionError, match=r"^a is at work") as caught:
        task(machine, mocker.Mock(system="installed"), Path(), Console(quiet=True))
    assert caught.value.hint.endswith("fab -H gpu1 stop --run a")


@pytest.mark.parametrize("task", [update_machine, rollback_machine])
def test_the_install_iso_is_not_updated(
    machine: Machine, seen: Facts, mocker: MockerFixture, task: type
) -> None:
    with pytest.raises(ProvisionError, match="on the install ISO"):
        task(machine, mocker.Mock(system="live"), Path(), Console(quiet=True))


def test_nothing_is_done_to_a_snapshot(machine: Machine, seen: Facts, mocker: MockerFixture) -> None:
    """The system from before an update runs, as the update was cut off: what is planned there would be lost."""
    before = replace(seen, subvolume="/@snapshots/before-update")
    mocker.patch("provision.update.gather_facts", return_value=before)
    for act in (
        lambda: update_machine(machine, mocker.Mock(system="installed"), Path(), Console(quiet=True)),
        lambda: system(machine, before, NOW),
    ):
        with pytest.raises(ProvisionError, match="runs the snapshot /@snapshots/before-update") as caught:
            act()
        assert caught.value.hint.endswith("fab -H gpu1 rollback")


def test_there_is_nothing_to_go_back_to(machine: Machine, seen: Facts, mocker: MockerFixture) -> None:
    past = replace(parse_past(SAID), number="", title="", day="")
    mocker.patch("provision.update.look_at_past", return_value=past)
    with pytest.raises(ProvisionError, match="nothing to go back to"):
        rollback_machine(machine, mocker.Mock(system="installed"), Path(), Console(quiet=True))


@pytest.mark.parametrize("reboot", [(), ("the running kernel's modules are gone",)])
@pytest.mark.parametrize("filesystem", ["ext4", "btrfs"])
def test_it_restarts_where_kernel_or_driver_changed(
    machine: Machine, seen: Facts, mocker: MockerFixture, reboot: tuple[str, ...], filesystem: str
) -> None:
    machine = replace(machine, disk=replace(machine.disk, filesystem=filesystem))
    past = parse_past(SAID)
    pasts = [past, *[replace(past, updating="2026-11-23")] * 2]
    mocker.patch("provision.update.look_at_past", side_effect=pasts)
    mocker.patch("provision.update.wanted_packages", return_value=("base",))
    mocker.patch("provision.update.look_for_newer", return_value=("tmux 1 -> 2",))
    mocker.patch("provision.update.converge", return_value=replace(seen, reboot=reboot))
    mocker.patch("provision.update.look_for_extras")
    mocker.patch("provision.update.render_extras", return_value="1 file of an upgrade")
    do, prove = mocker.patch("provision.update.do"), mocker.patch("provision.update.prove")
    restart = mocker.patch("provision.update.reboot_and_find", return_value=mocker.Mock(system="installed"))
    output = io.StringIO()
    update_machine(machine, mocker.Mock(system="installed"), Path(), Console(file=output, width=200))
    steps = [step.name for call in do.call_args_list for step in call.args[0]]
    first = "snapshot" if filesystem == "btrfs" else "note of the packages"
    way_back = ["way back"] if reboot and filesystem == "btrfs" else []
    assert steps == [first, "upgrade", *way_back, "end of the update"]
    assert restart.called == bool(reboot)
    assert prove.called
    assert "linux-lts  6.12.1-1 → 6.12.2-1" in output.getvalue()
    assert "1 file of an upgrade" in output.getvalue()


def test_an_update_that_fails_its_proof_can_be_taken_back(machine: Machine) -> None:
    with pytest.raises(ProvisionError) as caught, taken_back_by(machine):
        raise ProvisionError("the driver does not load", "Then: fab -H gpu1 update")
    assert caught.value.hint.splitlines() == [
        "Then: fab -H gpu1 update",
        "To take the update back: fab -H gpu1 rollback",
    ]


def test_the_scripts_are_bash(machine: Machine) -> None:
    btrfs = replace(machine, disk=replace(machine.disk, filesystem="btrfs"))
    steps = [
        take_snapshot(btrfs), note_packages(), upgrade(btrfs, ("a", "b")), arm(btrfs), finish(btrfs), go_back(),
        downgrade("https://archive.example"), replace(upgrade(machine, ()), name="plain"), replace(finish(machine), name="end"),
    ]  # fmt: skip
    plan = make_plan("", steps, [("?", True)] * len(steps))
    for script in (render_probes(steps, ""), render_apply(plan, "")):
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr
    for step in (upgrade(machine, ()), finish(machine)):
        assert "choose arch" not in step.script
        assert "choose before" not in step.script
