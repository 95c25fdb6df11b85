"""The report: one file, and everything in it."""

import json
import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workload.config import load_config, render_toml
from workload.errors import WorkloadError
from workload.files import only_one
from workload.metrics import Log, load_rows
from workload.report import LiveReport, Record, render_report, save_report

ROWS: list[dict[str, Any]] = [
    {"kind": "eval", "step": 0, "val_loss": 5.5, "val_bits_per_byte": 7.9, "elapsed_s": 0.1},
    *(
        {"kind": "step", "step": s, "loss": 5.0 / s, "lr": 1e-3, "grad_norm": 1.0, "tokens": 64 * s,
         "tokens_per_s": 1000.0 + s, "elapsed_s": s / 2}
        for s in range(1, 41)
    ),
    {"kind": "step", "step": 41, "loss": None, "lr": 1e-3, "grad_norm": None, "tokens": 64 * 41, "tokens_per_s": 1.0,
     "elapsed_s": 21.0},
    {"kind": "event", "step": 41, "text": "update left out"},
    {"kind": "eval", "step": 40, "val_loss": 1.25, "val_bits_per_byte": 1.8, "elapsed_s": 20.0},
    {"kind": "sample", "step": 20, "prompt": "To be", "text": " or <script>alert(1)</script>"},
    {"kind": "sample", "step": 40, "prompt": "To be", "text": " or not"},
]  # fmt: skip
STARTS = [
    {"from_step": 0, "environment": "a CPU & more", "parameters": 1234567},
    {"from_step": 20, "environment": "another", "parameters": 1234567},
]
CONFIG = {"model": {"n_layer": 2}, "train": {"steps": 50, "sample_prompt": "\n"}}
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def parse(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page)
    return parser.seen


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record("demo-1", CONFIG, Log(write_rows(tmp_path / "metrics.jsonl", ROWS)).read(), STARTS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a configuration and without rows."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.toml").write_text(render_toml(load_config("demo")), encoding="utf-8")
    return out


def test_the_page_needs_nothing_else(record: Record) -> None:
    page = render_report(record, "at work", NOW)
    tags = parse(page)
    assert not {"link", "img", "iframe", "object", "embed"} & {tag for tag, _ in tags}
    assert not [attrs for _, attrs in tags if {"src", "href", "onload"} & attrs.keys()]
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", page)


def test_the_page_shows_curves_samples_configuration_and_events(record: Record) -> None:
    page = render_report(record, "finished", NOW)
    assert sum(tag == "svg" for tag, _ in parse(page)) == 5
    for part in (
        "demo-1", "another", "1,234,567", "1.2500", "5.5000 at first", "1.8000", "n_layer", "0:21",
        "Sample after step 40", " or not", "&lt;script&gt;", "step 41: update left out", "step 20: resumed on another",
        "written <time", "2026-01-02 03:04:05 UTC", "1 step without a finite loss, the first is step 41",
    ):  # fmt: skip
        assert part in page
    curves = [attrs["points"] for tag, attrs in parse(page) if tag == "polyline"]
    assert all(curve and "nan" not in curve for curve in curves)


def test_a_page_loads_itself_again_only_while_the_run_is_at_work(record: Record) -> None:
    for status, again in (("at work", True), ("stopped", False), ("finished", False)):
        page = render_report(record, status, NOW)  # type: ignore[arg-type]
        assert ('http-equiv="refresh"' in page) == again
        # The script reloads where it finds this.
        assert bool(re.search(r"class='pill work'", page)) == again
        assert f">{status}</span>" in page


def test_the_gpus_curves_are_there_when_it_was_read(tmp_path: Path) -> None:
    rows = [
        {**row, "mfu": 0.4, "memory_bytes": 17.5e9, "temperature_c": 60.0, "power_w": 280.0}
        for row in ROWS
        if row["kind"] == "step"
    ]
    page = render_report(
        Record("r", CONFIG, Log(write_rows(tmp_path / "m", rows)).read(), []), "stopped", NOW
    )
    labels = {attrs["aria-label"] for tag, attrs in parse(page) if tag == "svg"}
    assert {"MFU by step", "GPU memory by step", "GPU temperature by step", "GPU power by step"} <= labels
    assert "40.0%" in page
    assert "17.5 GB" in page


def test_a_run_without_anything_yet_has_a_page(run: Path) -> None:
    page = save_report(run).read_text(encoding="utf-8")
    assert "n_layer" in page
    assert "<svg" not in page
    assert sorted(path.name for path in run.iterdir()) == ["config.toml", "report.html"]


def test_a_damaged_log_has_a_page_that_says_so(run: Path) -> None:
    good = [json.dumps(row) for row in ROWS]
    lines = [*good[:5], good[5][:20], "\x00\x00 rubbish", "[1]", '{"kind": "step"}', *good[6:], good[0][:9]]
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    page = save_report(run).read_text(encoding="utf-8")
    assert "lines that cannot be read and are left out, 4: 6, 7, 8, 9" in page
    assert "1.2500" in page
    with pytest.raises(WorkloadError, match=r"metrics\.jsonl, line 6: not a row of JSON") as error:
        list(load_rows(run / "metrics.jsonl"))
    assert "sed -i 6d" in error.value.hint


def test_rows_of_nothing_but_nan_have_a_page(run: Path) -> None:
    rows = [
        {"kind": "step", "step": s, "loss": math.nan, "lr": math.inf, "grad_norm": None, "tokens": s,
         "tokens_per_s": "fast", "elapsed_s": s} for s in range(1, 4)
    ] + [{"kind": "eval", "step": 3, "val_loss": math.nan}]  # fmt: skip
    write_rows(run / "metrics.jsonl", rows)
    page = save_report(run).read_text(encoding="utf-8")
    assert "3 steps without a finite loss, the first is step 1" in page
    assert "<svg" not in page


def test_no_run_is_a_readable_error(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="so not a run"):
        save_report(tmp_path)


def test_how_a_run_stands_is_read_from_its_files(run: Path) -> None:
    def status() -> str:
        page = save_report(run).read_text(encoding="utf-8")
        return re.findall(r"class='pill \w+'>([\w ]+)<", page)[0]

    write_rows(run / "metrics.jsonl", ROWS)
    assert status() == "stopped"
    with only_one(run):  # as a training does
        assert status() == "at work"
    assert status() == "stopped"
    checkpoint = run / "checkpoints" / "step-00000041"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 41, "steps": 41}')  # fitted into the time that there was
    assert status() == "finished"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_live_report_comes_when_it_is_due_and_at_the_end(run: Path) -> None:
    clock = Clock()
    report = LiveReport(run, clock)
    write_rows(run / "metrics.jsonl", ROWS[:10])
    page = run / "report.html"
    clock.now = 14.0
    report.step()
    assert not page.exists()
    clock.now = 15.0
    report.step()
    assert "at work" in page.read_text(encoding="utf-8")
    write_rows(run / "metrics.jsonl", ROWS)
    clock.now = 16.0
    report.step()
    assert "Sample after" not in page.read_text(encoding="utf-8")
    report.save("finished")
    text = page.read_text(encoding="utf-8")
    assert "Sample after step 40" in text
    assert ">finished</span>" in text


def test_a_report_that_cannot_be_written_does_not_end_the_run(run: Path) -> None:
    clock = Clock()
    report = LiveReport(run, clock)
    (run / ".report.html.partial").mkdir()  # in the way, as a full disk is
    clock.now = 20.0
    report.step()
    assert not (run / "report.html").exists()
    (run / ".report.html.partial").rmdir()
    clock.now = 40.0
    report.step()
    assert (run / "report.html").exists()


def test_a_report_that_takes_long_waits_for_longer(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes 2 s of the run's time is written every 200 s: a hundredth."""
    clock, written = Clock(), []

    def slow(*_: object) -> None:
        clock.now += 2.0
        written.append(clock.now)

    monkeypatch.setattr("workload.report._write", slow)
    report = LiveReport(run, clock)
    while clock.now < 1000.0:
        clock.now += 1.0
        report.step()
    assert len(written) == 5


def test_a_log_takes_in_what_is_new_and_begins_again_when_it_was_cut_back(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "metrics.jsonl", ROWS[:20])
    log = Log(path)
    assert len(log.read().steps["loss"]) == 19
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(ROWS[20]) + "\n" + json.dumps(ROWS[21])[:30])
    assert log.read().steps["step"][-1] == 20
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(ROWS[21])[30:] + "\n")
    assert log.read().steps["step"][-1] == 21
    other = {**ROWS[11], "loss": 123.0}
    write_rows(path, [*ROWS[:11], other, *ROWS[12:40]])  # cut back by a resume, and longer again
    log.read()
    assert list(log.steps["step"]) == [float(row["step"]) for row in ROWS[1:40]]
    assert 123.0 in log.steps["loss"]
    assert log.damaged == []
    path.unlink()
    assert not log.read().steps["step"]


def test_a_long_run_has_a_small_page_that_keeps_its_spike(run: Path) -> None:
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, 20_001):
            row = {**ROWS[1], "step": step, "tokens": step * 64, "loss": 999.0 if step == 12_345 else 2.0}
            file.write(json.dumps(row) + "\n")
        for step in range(0, 20_001, 20):
            file.write(json.dumps({"kind": "sample", "step": step, "prompt": "a", "text": "b" * 500}) + "\n")
            file.write(json.dumps({"kind": "event", "step": step, "text": "something"}) + "\n")
    page = save_report(run).read_text(encoding="utf-8")
    assert len(page) < 400_000
    assert "701 more before these" in page
    faint = next(
        attrs["points"] for tag, attrs in parse(page) if tag == "polyline" and attrs["class"] == "faint"
    )
    assert faint is not None
    heights = np.array([float(point.split(",")[1]) for point in faint.split()])
    assert heights.min() < 20 < 200 < np.median(heights)  # y grows downwards
