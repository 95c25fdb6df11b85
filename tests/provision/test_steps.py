"""Steps run for real: their bash, in a scratch root that borrows this computer's programs."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from provision.errors import ProvisionError
from provision.steps import (
    Directory,
    File,
    Link,
    Packages,
    Plan,
    Script,
    Step,
    User,
    check_unique,
    flag,
    make_plan,
    merge_packages,
    parse_probes,
    render_apply,
    render_plan,
    render_probes,
)
from tests.provision.conftest import Run


def plan_of(run: Run, root: Path, steps: Sequence[Step]) -> Plan:
    answer = run(render_probes(steps, str(root)))
    assert answer.returncode == 0, answer.stderr
    return make_plan("scratch", steps, parse_probes(steps, answer.stdout))


def apply(run: Run, root: Path, plan: Plan) -> subprocess.CompletedProcess[str]:
    return run(render_apply(plan, str(root)))


STEPS = [
    File("/etc/motd", "a 'quoted' {brace} $dollar `tick`\nlast line without end", why="text"),
    File("/etc/empty", "", why="empty", mode=0o600),
    File("/var/lib/deep/er/file", "ü\n", why="folders are made", owner="root:wheel"),
    Directory("/srv", why="folder", mode=0o750, owner="root:wheel"),
    Link("/etc/localtime", "/usr/share/zoneinfo/Europe/Berlin", why="link"),
    User("ml", shell="/bin/bash", groups=["wheel"], why="user"),
]


def test_apply_makes_every_kind_done(run: Run, root: Path) -> None:
    plan = plan_of(run, root, STEPS)
    assert len(plan.pending) == len(STEPS)
    result = apply(run, root, plan)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (root / "etc/motd").read_text() == "a 'quoted' {brace} $dollar `tick`\nlast line without end"
    assert (root / "var/lib/deep/er/file").stat().st_gid == 998
    assert (root / "srv").stat().st_mode & 0o777 == 0o750
    assert "ml:*:" in (root / "etc/shadow").read_text()
    assert plan_of(run, root, STEPS) == Plan("scratch", (), len(STEPS))


@pytest.mark.parametrize(
    "damage",
    [
        "echo other > etc/motd",
        "chmod 644 etc/empty",
        "chown 0:0 var/lib/deep/er/file",
        "rm -r srv",
        "ln -sfn /usr/share/zoneinfo/UTC etc/localtime",
        "sed -i '/^ml:/s,/bin/bash,/bin/false,' etc/passwd",
        "rm etc/motd; ln -s empty etc/motd",
    ],
)
def test_drift_is_seen_and_mended(run: Run, root: Path, damage: str) -> None:
    apply(run, root, plan_of(run, root, STEPS))
    subprocess.run(damage, shell=True, cwd=root, check=True)  # noqa: S602 - the commands stand above
    plan = plan_of(run, root, STEPS)
    assert len(plan.pending) == 1
    assert apply(run, root, plan).returncode == 0
    assert not plan_of(run, root, STEPS)


def test_then_runs_once_for_all_that_name_it_and_only_when_something_changed(run: Run, root: Path) -> None:
    then = 'echo built >> "$root"/etc/builds'
    steps = [File("/etc/a", "1\n", why="a", then=then), File("/etc/b", "2\n", why="b", then=then)]
    apply(run, root, plan_of(run, root, steps))
    assert (root / "etc/builds").read_text() == "built\n"
    assert not plan_of(run, root, steps)
    (root / "etc/a").write_text("changed")
    apply(run, root, plan_of(run, root, steps))
    assert (root / "etc/builds").read_text() == "built\nbuilt\n"


def test_a_then_that_was_cut_off_is_owed(run: Run, root: Path) -> None:
    then = 'test -e "$root"/etc/ready'
    steps = [File("/etc/a", "1\n", why="a", then=then)]
    assert apply(run, root, plan_of(run, root, steps)).returncode != 0
    plan = plan_of(run, root, steps)
    assert plan.pending[0].owed
    assert "interrupted before" in render_plan(plan)
    (root / "etc/ready").touch()
    assert apply(run, root, plan).returncode == 0
    assert not (root / flag(then).lstrip("/")).exists()
    assert not plan_of(run, root, steps)


def test_a_failing_step_stops_the_rest_and_says_which_command(run: Run, root: Path) -> None:
    steps = [
        Script("first", why="", probe="true", script="echo fine"),
        Script("second", why="", probe="true", script="echo before\ngrep -q x /dev/null\necho after"),
        File("/etc/never", "", why=""),
    ]
    result = apply(run, root, plan_of(run, root, steps))
    assert result.returncode == 1
    assert result.stdout.split("\n") == [
        "@@begin 0 first", "fine", "", "@@end 0", "@@begin 1 second", "before",
        "command failed with exit 1: grep -q x /dev/null", "", "@@failed 1 1", "",
    ]  # fmt: skip
    assert not (root / "etc/never").exists()


def test_a_step_cannot_eat_the_script(run: Run, root: Path) -> None:
    steps = [Script("cat", why="", probe="cat", script="cat"), File("/etc/after", "x", why="")]
    assert apply(run, root, plan_of(run, root, steps)).returncode == 0
    assert (root / "etc/after").exists()


def test_packages_merge_into_one_transaction_at_the_first_place() -> None:
    steps = [Packages("a", "b", why="one"), Link("/x", "/y", why=""), Packages("b", "c", why="two")]
    merged = merge_packages(steps)
    assert [step.packages for step in merged] == [("a", "b", "c"), ()]
    assert merged[0].why == "a b: one; b c: two"
    assert re.search(r"pacman -Syu [^\n]* --needed [^\n]* a b c\n", merged[0].script)
    assert merge_packages(steps[1:2]) == steps[1:2]


def test_two_steps_of_one_name_are_refused() -> None:
    with pytest.raises(ProvisionError, match="file /a"):
        check_unique([File("/a", "", why=""), File("/a", "x", why="")])


def test_a_file_that_looks_like_an_answer_is_only_a_file(run: Run, root: Path) -> None:
    """The mark between two answers is another one every time, so nothing on the host can pretend to be one."""
    steps = [File("/etc/a", "wanted", why=""), File("/etc/b", "wanted", why="")]
    first = run(render_probes(steps, str(root))).stdout
    mark = first.split("\n")[0]
    (root / "etc/a").write_text(f"{mark} 1 clear\n{steps[1].expect}\n{mark} end\n")
    (root / "etc/b").write_bytes(b"\xff\0\r\nno end")
    again = run(render_probes(steps, str(root))).stdout
    assert again.split("\n")[0] != mark
    a, b = parse_probes(steps, again)
    assert a[0].endswith(f"{mark} end\n")
    assert b[0].endswith("no end")


@pytest.mark.parametrize(
    "text", ["", "M\n", "M\nM 0 clear\n\n", "M\nM 1 clear\n\nM end\n", "M\nx\nM 0 clear\n\nM end\n"]
)
def test_a_cut_answer_of_the_probes_is_refused(text: str) -> None:
    with pytest.raises(ProvisionError):
        parse_probes([Link("/a", "/b", why="")], text)


def test_the_plan_shows_what_differs(run: Run, root: Path) -> None:
    (root / "etc/hosts").write_text("a\nb\nc\n")
    steps = [File("/etc/hosts", "a\nB\nc\n", why="because")]
    assert render_plan(plan_of(run, root, steps)).splitlines() == [
        "scratch: 1 Steps to do, 0 done",
        "  1. file /etc/hosts: because",
        "        a",
        "       -b",
        "       +B",
        "        c",
    ]
