"""The report, on values: it must count what was, and hide nothing."""

from tests.faults.__main__ import Record
from tests.faults.compare import Difference
from tests.faults.cuts import Cut, Hit, Stage
from tests.faults.install import Outcome
from tests.faults.report import render

STEPS: dict[Stage, dict[str, float]] = {"live": {"one": 0.1, "two": 0.2}, "installed": {"three": 0.3}}


def test_what_was_cut_what_was_missed_and_what_went_wrong() -> None:
    cuts = [
        Cut("live", "one", "power"),
        Cut("live", "two", "power"),
        Cut("live", "", "power", line="Probed again"),
    ]
    hits = [Hit(cuts[0], "one"), Hit(cuts[1], "", between="1"), Hit(cuts[2], cuts[2].aim)]
    outcome = Outcome(hits, runs=4, boots=5, seconds=90.0, leaks=["the journal"])
    records = {
        "reference": Record([], Outcome(steps=STEPS)),
        "power": Record(cuts, outcome, different=[Difference("files", "/etc/x", "1", None)]),
        "process": Record(cuts[:1], Outcome(), error="it hung"),
    }
    text = render(records, "--seed 1")
    assert "| power | 3 / 3 | 2 | 1 / 3 | 4 | 5 | 1.5 | yes | 1 | 1 |" in text
    assert "power, Steps aimed at and never cut: two." in text
    assert "files: /etc/x: 1 → not there" in text
    assert "the password can be read: the journal" in text
    assert "| process | 0 / 1 | 0 | 0 / 3 | 0 | 0 | 0.0 | no |" in text
    assert "process: **it hung**" in text
