"""The report: one file, and everything in it."""

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workload.charts import Line, log_ticks, render_chart, smooth, thin, ticks
from workload.config import load_config, render_toml
from workload.report import render_report, save_report

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


def test_the_page_needs_nothing_else() -> None:
    tags = parse(render_report("demo-1", CONFIG, ROWS, STARTS))
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in tags}
    assert not [attrs for _, attrs in tags if {"src", "href", "onload"} & attrs.keys()]
    page = render_report("demo-1", CONFIG, ROWS, STARTS)
    assert not re.search(r"https?://|url\(|@import", page)


def test_the_page_shows_curves_samples_configuration_and_events() -> None:
    page = render_report("demo-1", CONFIG, ROWS, STARTS)
    assert sum(tag == "svg" for tag, _ in parse(page)) == 5
    for part in (
        "demo-1", "another", "1,234,567", "1.2500", "5.5000 at first", "1.8000", "n_layer", "0:21",
        "Sample after step 40", " or not", "&lt;script&gt;", "step 41: update left out", "step 20: resumed on another",
    ):  # fmt: skip
        assert part in page
    curves = [attrs["points"] for tag, attrs in parse(page) if tag == "polyline"]
    assert all(curve and "nan" not in curve for curve in curves)


def test_a_run_without_anything_yet_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(render_toml(load_config("demo")), encoding="utf-8")
    page = save_report(tmp_path).read_text(encoding="utf-8")
    assert "n_layer" in page
    assert "<svg" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "report.html"]


def test_points_are_where_their_values_are() -> None:
    line = Line("a", "a", [(0, 1.0), (50, 10.0), (100, 100.0)])
    chart = render_chart("t", "u", [line], log=True)
    match = re.search(r'polyline class="a" points="([^"]+)"', chart)
    assert match
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in match[1].split())
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.2)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.2)  # a straight line, for the axis is logarithmic
    assert y0 > y2
    assert render_chart("t", "u", [Line("a", "a", [(1, float("nan"))])]) == ""


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 8
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in found)


@given(st.floats(1e-6, 1e6), st.floats(1.05, 1e6))
def test_log_ticks_are_inside(low: float, ratio: float) -> None:
    found = log_ticks(low, low * ratio)
    assert len(found) >= 1
    assert all(low * 0.999 <= tick <= low * ratio * 1.001 for tick in found)


def test_means() -> None:
    points: Sequence[tuple[float, float]] = [(float(i), float(i % 2)) for i in range(1000)]
    assert len(thin(points, 100)) == 100
    assert thin(points, 100)[0] == (4.5, 0.5)
    assert thin(points, 2000) == points
    assert [y for _, y in smooth(points, 2)][:4] == [0.0, 0.5, 0.5, 0.5]
