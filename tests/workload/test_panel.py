"""The live panel at every size of a terminal."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from workload.panel import View, render_panel, sparkline

FULL = View(
    step=1200,
    steps=2000,
    loss=3.21451,
    lr=3e-4,
    grad_norm=0.52,
    rate=12345.6,
    eta_s=754,
    elapsed_s=1120,
    mfu=0.412,
    gpu={"memory_bytes": 17.2e9, "temperature_c": 61.0, "power_w": 287.0},
    val=(3.3012, 1.1034),
    best=(3.2999, 1000),
    losses=[8.0 / (i + 1) for i in range(200)],
)


def draw(view: View, width: int, height: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, height=height).print(render_panel(view, width, height))
    return stream.getvalue().splitlines()


def test_all_of_it_in_six_lines_of_a_usual_terminal() -> None:
    lines = draw(FULL, 100, 30)
    assert len(lines) == 6
    text = "\n".join(lines)
    for part in (
        "1,200/2,000", "60%", "eta 12:34", "loss 3.2145", "val 3.3012 (best 3.2999 at 1,000)", "1.1034 bits/byte",
        "lr 3.00e-04", "grad 0.52", "12,346 tok/s", "mfu 41.2%", "gpu 17.2 GB", "61 °C", "287 W", "time 18:40", "█",
    ):  # fmt: skip
        assert part in text
    assert "best" not in "".join(draw(replace(FULL, best=(3.3012, 1200)), 100, 30))
    assert "saving" in draw(replace(FULL, doing="saving"), 100, 30)[0]


@pytest.mark.parametrize("height", [3, 8, 24])
def test_nothing_wraps_and_the_step_and_the_loss_stay(height: int) -> None:
    for width in range(12, 130, 3):
        lines = draw(FULL, width, height)
        assert len(lines) <= height
        assert all(len(line) <= width for line in lines)
        assert "1,200/2,00" in lines[0 if "╭" not in lines[0] else 1]
        assert height < 4 or any("loss 3.2145" in line for line in lines)


def test_before_there_is_much_to_say() -> None:
    view = View(
        step=0, steps=0, loss=float("nan"), lr=0.0, grad_norm=0.0, rate=0.0, eta_s=float("inf"), elapsed_s=0.0
    )
    assert any("loss nan" in line for line in draw(view, 80, 24))


def test_a_sparkline_falls_with_its_values_and_has_room() -> None:
    assert sparkline([8.0, 4.0, 2.0, 1.0], 4) == "█▆▃▁"
    assert len(sparkline([float(i) for i in range(1, 1000)], 30)) <= 30
    assert sparkline([1.0, float("nan")], 10) == ""
    assert sparkline([2.0, 2.0, 2.0], 10) == "▁▁▁"
