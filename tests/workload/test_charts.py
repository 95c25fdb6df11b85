"""Charts: where their points are, and what of many points is drawn."""

import json
import re
from html import unescape

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workload.charts import (
    Line,
    log_ticks,
    render_chart,
    smooth,
    thin,
    thin_to_extremes,
    ticks,
    time_axis,
    token_axis,
)


def line(*points: tuple[float, float], dots: bool = False) -> Line:
    return Line("a", "a", np.array([x for x, _ in points]), np.array([y for _, y in points]), dots=dots)


def places(chart: str) -> list[tuple[float, float]]:
    match = re.search(r'polyline class="a" data-label="a" points="([^"]+)"', chart)
    assert match
    return [(float(x), float(y)) for x, y in (p.split(",") for p in match[1].split())]


def test_points_are_where_their_values_are() -> None:
    (x0, y0), (x1, y1), (x2, y2) = places(
        render_chart("t", "u", [line((0, 1.0), (50, 10.0), (100, 100.0))], log=True)
    )
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.2)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.2)  # a straight line, for the axis is logarithmic
    assert y0 > y2


@pytest.mark.parametrize("log", [False, True])
def test_the_scale_gives_the_values_back_to_the_script(log: bool) -> None:
    values = [(0.0, 10.5), (40.0, 3.25), (100.0, 3.0625)]
    chart = render_chart("t", "u", [line(*values)], log=log)
    scale = json.loads(unescape(re.findall(r'data-scale="([^"]+)"', chart)[0]))
    for (px, py), (x, y) in zip(places(chart), values, strict=True):
        assert (px - scale["left"]) / (scale["right"] - scale["left"]) * scale["x"] == pytest.approx(
            x, abs=0.1
        )
        part = (scale["bottom"] - py) / (scale["bottom"] - scale["top"])
        low, high = scale["low"], scale["high"]
        assert (low * (high / low) ** part if log else low + (high - low) * part) == pytest.approx(
            y, rel=2e-4
        )


def test_what_is_not_finite_is_left_out() -> None:
    assert render_chart("t", "u", [line((1, float("nan")), (2, float("inf")))]) == ""
    assert render_chart("t", "u", [line((1, -1.0), (2, 0.0))], log=True) == ""
    assert len(places(render_chart("t", "u", [line((1, 1.0), (2, float("nan")), (3, 2.0))]))) == 2


def test_axes_of_tokens_and_of_time_have_round_ticks_in_a_unit() -> None:
    chart = render_chart("t", "u", [line((0, 1.0), (3_200_000, 2.0))], axis=token_axis(3.2e6))
    assert ">1 M<" in chart
    assert 'aria-label="t by tokens"' in chart
    chart = render_chart("t", "u", [line((0, 1.0), (7500, 2.0), dots=True)], axis=time_axis(7500))
    assert ">1.5 h<" in chart
    assert "time 2.083 h: 2" in chart
    assert time_axis(100).unit == "s"
    assert (time_axis(600).unit, time_axis(86400 * 3).unit, token_axis(10).unit) == ("min", "d", "")


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
    x = np.arange(1000.0)
    y = x % 2
    few_x, few_y = thin(x, y, 100)
    assert len(few_x) == 100
    assert (few_x[0], few_y[0]) == (4.5, 0.5)
    assert thin(x, y, 2000)[0] is x
    assert smooth(y, 2).tolist()[:4] == [0.0, 0.5, 0.5, 0.5]
    assert smooth(y[:3], 5).tolist() == [0.0, 0.5, 1 / 3]


@given(st.integers(1, 3000), st.integers(0, 2999), st.integers(0, 2999))
def test_thinning_to_extremes_loses_neither_end_nor_spike(n: int, up: int, down: int) -> None:
    y = np.zeros(n)
    y[up % n] = 1.0
    y[down % n] -= 2.0
    few_x, few_y = thin_to_extremes(np.arange(float(n)), y, 100)
    assert len(few_x) <= 100 + 2
    assert (few_y.max(), few_y.min()) == (y.max(), y.min())
    assert (np.diff(few_x) > 0).all()
