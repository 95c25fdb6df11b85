"""The planning of cuts, and the bash that freezes a Step, on values."""

import shlex
import subprocess
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from tests.faults.cuts import (
    KINDS,
    Cut,
    Hit,
    Stage,
    never_hit,
    parse_kinds,
    parse_marker,
    plan_cuts,
    rotate,
    sample_cuts,
)
from tests.faults.watch import render_watch

STEPS: Mapping[Stage, Mapping[str, float]] = {
    "live": {"clock": 0.8, "partition /dev/vdb": 4.1, "install 13 packages": 45.0, "file /etc/fstab": 0.4}
    | {f"file /etc/{index}": 0.0 for index in range(8)},
    "installed": {"17 packages": 6.2, "python environment": 44.0},
}


def test_every_step_is_cut_and_a_long_one_at_rising_places() -> None:
    for kind in KINDS:
        cuts = plan_cuts(STEPS, kind, seed=3)
        assert list(dict.fromkeys(cut.step for cut in cuts if cut.step)) == [
            *STEPS["live"],
            *STEPS["installed"],
        ]
        places = [cut.after_s for cut in cuts if cut.step == "install 13 packages"]
        assert len(places) == 4
        assert places == sorted(places)
        assert all(0 < place < 45 for place in places)
        assert all(cut.after_s < 0.1 for cut in cuts if STEPS[cut.stage].get(cut.step, 0) < 5)
        assert cuts == plan_cuts(STEPS, kind, seed=3)
        assert cuts != plan_cuts(STEPS, kind, seed=4)
        once = [cut.step for cut in plan_cuts(STEPS, kind, seed=3, places=1) if cut.step]
        assert once == [*STEPS["live"], *STEPS["installed"]]


def test_between_the_steps_and_the_reboot_is_a_cut_too() -> None:
    for kind in ("process", "power"):
        moments = [cut for cut in plan_cuts(STEPS, kind, seed=1) if not cut.step]
        assert ("live", "after: Probed again") in [(cut.stage, cut.aim) for cut in moments]
        assert never_hit(moments, [Hit(cut, cut.aim) for cut in moments]) == []


def test_a_dropped_connection_is_always_back_within_the_minute() -> None:
    drops = {(cut.drop, cut.drop_s) for cut in plan_cuts(STEPS, "connection", seed=1)}
    assert {"cut", "swallow"} == {drop for drop, _ in drops}
    assert max(seconds for _, seconds in drops) < 60


@given(count=st.integers(1, 30), seed=st.integers(0, 99))
def test_a_sample_is_in_order_and_has_both_stages(count: int, seed: int) -> None:
    cuts = plan_cuts(STEPS, "power", seed=1)
    sample = sample_cuts(cuts, count, seed)
    assert len(sample) == min(count, len(cuts))
    assert [cut for cut in cuts if cut in sample] == sample
    assert count < 2 or {cut.stage for cut in sample} == {"live", "installed"}


@given(day=st.integers(0, 5000))
def test_a_day_has_all_kinds_each_in_a_step_of_its_own(day: int) -> None:
    names = {stage: list(steps) for stage, steps in STEPS.items()}
    cuts = rotate(names, day)
    assert sorted((cut.stage, cut.kind) for cut in cuts) == [
        ("installed", "power"),
        *[("live", "connection")] * 3,
        ("live", "power"),
        *[("live", "process")] * 2,
    ]
    assert len({cut.step for cut in cuts}) == len(cuts)
    live = [cut.step for cut in cuts if cut.stage == "live"]
    assert live == sorted(live, key=names["live"].index)


def test_the_days_reach_every_step() -> None:
    names = {stage: list(steps) for stage, steps in STEPS.items()}
    seen = {(cut.stage, cut.step) for day in range(40) for cut in rotate(names, day)}
    assert seen == {(stage, name) for stage, steps in names.items() for name in steps}


def test_markers() -> None:
    assert parse_marker("@@begin 4 install 13 packages") == ("begin", "install 13 packages")
    assert parse_marker("@@end 4") == ("end", "4")
    assert parse_marker("@@failed 4 1") == ("failed", "4 1")
    assert parse_marker("") == parse_marker("something else") == ("", "")


def test_a_cut_counts_for_the_step_that_was_at_work() -> None:
    first, second = Cut("live", "one", "power"), Cut("live", "two", "power")
    hits = [Hit(first, "two"), Hit(second, "", between="7")]
    assert [hit.on_target for hit in hits] == [False, False]
    assert never_hit([first, second], hits) == [("live", "one")]


def test_words_of_the_command_line() -> None:
    assert parse_kinds("power,process") == ["power", "process"]


def test_the_watcher_knows_names_with_anything_in_them() -> None:
    names = {'it\'s $HOME `x` "y" [z] !': [0.0], "17 packages": [2.0, 5.5]}
    text = render_watch(names)
    declared = text.partition("export LC_ALL")[0]
    show = 'for name in "${!wanted[@]}"; do printf "%s|%s\\n" "$name" "${wanted[$name]}"; done'
    done = subprocess.run(["bash", "-euc", f"{declared}\n{show}"], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == ["17 packages|2.0 3.5", 'it\'s $HOME `x` "y" [z] !|0.0']
    assert subprocess.run(["bash", "-n", "-c", text], check=False).returncode == 0
    assert shlex.split(shlex.quote(text)) == [text]
