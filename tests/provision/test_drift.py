"""What `plan` shows on an installed machine beside its Steps, and the plan that would shut this computer out."""

import io
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pytest_mock import MockerFixture
from rich.console import Console

from provision.drift import Extras, parse_extras, render_extras, render_look
from provision.errors import ProvisionError
from provision.facts import Facts
from provision.flow import converge, show_plan
from provision.machine import Machine
from provision.steps import STATE, File, Plan, Planned, make_plan, render_plan
from provision.system import system
from provision.system.base import keys_of
from tests.provision.conftest import KEY
from tests.provision.test_own import wish
from tests.provision.test_system import NOW, installed

# A pacman over a few lists, and a systemctl that knows a few units.
STANDIN = r"""
pacman() {
  case $1 in
    -Qq) for name in "${@:2}"; do [[ $name == nothing ]] || echo "$name"; done ;;
    -Sgq) echo grouped ;;
    -Qqe) printf '%s\n' base tmux old-tool by-hand grouped tool ;;
    -Qqdt) echo lonely ;;
    -Qqm) printf '%s\n' tool stranger ;;
  esac
}
find() { if [[ $1 == /.snapshots ]]; then echo /.snapshots/rolled-back-2026-11-02; else command find "$@"; fi; }
systemctl() {
  if [[ $1 == list-units ]]; then echo 'x.service loaded failed failed A unit'; return; fi
  if [[ $1 == cat ]]; then printf '%s\n' '[Install]' 'Also=along.socket  along.path'; return; fi
  printf '%s\n' 'along.socket enabled disabled' 'sshd.service enabled disabled' 'mine.timer enabled disabled' 'getty@.service enabled enabled' \
    'metal-run-a.service enabled disabled'
}
"""
LOG = """\
[2026-11-01T10:00:00+0000] [PACMAN] Running 'pacman -r /mnt -Sy --noconfirm base old-tool --noprogressbar'
[2026-11-02T10:00:00+0000] [PACMAN] Running 'pacman -S by-hand'
[2026-11-03T10:00:00+0000] [PACMAN] starting full system upgrade
[2026-11-04T10:00:00+0000] [PACMAN] Running 'pacman -S old-tool'
"""


@pytest.fixture
def seen(tmp_path: Path, live: Facts) -> Extras:
    """pacman and systemctl are stand-ins here; tests/rehearsal/test_drift.py asks the real pacman."""
    own = f'[system]\npackages = ["tmux"]\ngroups = ["some"]\n[aur.tool]\ncommit = "{"a" * 40}"\n'
    machine = wish(tmp_path / "own", own)
    facts = installed(machine, live)
    steps = system(machine, facts, NOW)
    (tmp_path / "etc/app").mkdir(parents=True)
    (tmp_path / "etc/app/app.conf.pacnew").touch()
    (tmp_path / "etc/app/app.conf").touch()
    (tmp_path / "etc/passwd").write_text(
        "root:x:0:0::/:/bin/sh\nml:x:1000:1000::/:/\nguest:x:1001:1::/:/\nnobody:x:65534:1::/:/\n"
    )
    (tmp_path / "log").write_text(LOG)
    (tmp_path / "before-update.conf").write_text("title Arch Linux, as it was\nlinux /x\n")
    (tmp_path / "updating").write_text("2026-11-04\n")
    script = render_look(machine, facts, steps)
    for path, here in (
        ("/var/log/pacman.log", "log"),
        ("find /etc", "etc"),
        ("/etc/passwd", "etc/passwd"),
        ("/boot/loader/entries", ""),
        (STATE, ""),
    ):
        assert path in script
        script = script.replace(path, f"{'find ' if path.startswith('find') else ''}{tmp_path}/{here}")
    done = subprocess.run(["bash", "-c", STANDIN + script], capture_output=True, text=True, check=True)
    return parse_extras(machine, facts, steps, done.stdout)


def test_what_no_machine_file_names_is_told_apart(seen: Extras, tmp_path: Path) -> None:
    assert seen == Extras(
        by_hand=("by-hand",),
        no_longer_wanted=("old-tool",),
        unneeded=("lonely",),
        foreign=("stranger",),
        leftover_files=(f"{tmp_path}/etc/app/app.conf.pacnew",),
        failed=("x.service",),
        enabled=("mine.timer",),
        accounts=("guest",),
        rolled_back=("/.snapshots/rolled-back-2026-11-02",),
        upgraded="2026-11-03",
        before="Arch Linux, as it was",
        updating="2026-11-04",
    )


def test_a_person_reads_what_it_is_and_what_to_do(seen: Extras) -> None:
    text = render_extras(seen)
    for said in (
        "once: old-tool",
        "by hand: by-hand",
        "sudo pacman -Rns",
        "x.service",
        "on 2026-11-03",
        "goes back to: Arch Linux, as it was",
        "update of 2026-11-04 was not finished",
    ):
        assert said in text
    nothing = Extras(*[()] * 9, upgraded="", before="", updating="")  # type: ignore[arg-type]
    assert render_extras(nothing) == ""
    assert "In no machine file" not in render_extras(replace(nothing, failed=("x.service",)))


def test_an_answer_that_is_cut_is_not_believed(machine: Machine, live: Facts) -> None:
    with pytest.raises(ProvisionError, match="incomplete"):
        parse_extras(machine, installed(machine, live), [], "@by_hand\nx\n")


def test_the_plan_shows_the_drift_of_a_file_what_follows_and_no_control_characters() -> None:
    step = File("/etc/a", "one\ntwo\n", why="text", then="in_target locale-gen")
    there = "regular file, mode 600, root:root\none\n\x1b[31mtwo\n"
    text = render_plan(make_plan("t", [step], [(there, False)]))
    lines = [line.strip() for line in text.splitlines()]
    assert lines[2:] == [
        "-regular file, mode 600, root:root",
        "+regular file, mode 644, root:root",
        "one",
        "-\ufffd[31mtwo",
        "+two",
        "then locale-gen",
    ]


# --- who may log in -----------------------------------------------------------------------------------------


@pytest.fixture
def keys_differ(machine: Machine, mocker: MockerFixture) -> Callable[[bool], Plan]:
    """The plan changes authorized_keys; whether this computer has one of the keys that it will hold."""
    step = File(keys_of(machine).removeprefix("file "), f"{KEY}\n", why="the keys that log in")
    plan = Plan("t", (Planned(step, "regular file, mode 600, ml:ml\nanother\n"),), 5)

    def make(has_one: bool) -> Plan:
        mocker.patch("provision.flow.plan_for", return_value=plan)
        keys = {" ".join(KEY.split()[:2])} if has_one else set()
        mocker.patch("provision.flow.own_keys", return_value=keys)
        return plan

    return make


def test_the_step_that_decides_who_logs_in_has_that_name(machine: Machine, live: Facts) -> None:
    names = [step.name for step in system(machine, installed(machine, live), NOW)]
    assert names.count(keys_of(machine)) == 1


@pytest.mark.parametrize("has_one", [True, False])
def test_changed_keys_on_an_installed_machine_do_not_shut_this_computer_out(
    machine: Machine, live: Facts, mocker: MockerFixture, keys_differ: Callable[[bool], Plan], has_one: bool
) -> None:
    keys_differ(has_one)
    facts = installed(machine, live)
    apply = mocker.patch("provision.flow.apply", side_effect=InterruptedError)
    expected = InterruptedError if has_one else ProvisionError
    with pytest.raises(expected) as caught:
        converge(machine, facts, mocker.Mock(), Console(quiet=True), lambda: None)
    assert apply.called == has_one
    if not has_one:
        assert "could not log in" in str(caught.value)


def test_keys_that_stay_as_they_are_are_not_judged(
    machine: Machine, live: Facts, mocker: MockerFixture, keys_differ: Callable[[bool], Plan]
) -> None:
    """A key on a token cannot be read from here, and logs in all the same."""
    keys_differ(False)
    plan = Plan("t", (Planned(File("/etc/a", "", why=""), ""),), 5)
    mocker.patch("provision.flow.plan_for", return_value=plan)
    mocker.patch("provision.flow.apply", side_effect=InterruptedError)
    with pytest.raises(InterruptedError):
        converge(machine, installed(machine, live), mocker.Mock(), Console(quiet=True), lambda: None)


def test_the_plan_says_that_it_would_be_refused(
    machine: Machine, live: Facts, mocker: MockerFixture, keys_differ: Callable[[bool], Plan], seen: Extras
) -> None:
    keys_differ(False)
    facts = replace(installed(machine, live), reboot=("another NVIDIA driver is installed than runs",))
    mocker.patch("provision.flow.gather_facts", return_value=facts)
    mocker.patch("provision.flow.look_for_extras", return_value=seen)
    output = io.StringIO()
    show_plan(machine, mocker.Mock(), Console(file=output, width=200))
    for said in (
        "provision would refuse: None of this computer's SSH keys",
        "A reboot is due: another NVIDIA driver is installed than runs.",
        "To do it: fab -H gpu1 provision",
        "packages installed by hand: by-hand",
    ):
        assert said in output.getvalue()
