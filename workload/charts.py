"""Line charts as inline SVG: no library, no script needed to see them."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Point = tuple[float, float]
WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 26, 12, 34
MOST_POINTS = 400  # a line; more cannot be told apart at this width


@dataclass(frozen=True)
class Axis:
    """What x is. Ticks are round in `unit`, which is `size` of what the points are in."""

    name: str
    size: float = 1.0
    unit: str = ""
    show: Callable[[float], str] = "{:,.0f}".format


@dataclass(frozen=True)
class Line:
    """`style` is a class of the page's stylesheet. x and y are as long as each other; what is not finite is left out."""

    label: str
    style: str
    x: Floats
    y: Floats
    dots: bool = False  # mark every point: for lines of few points
    extremes: bool = False  # thinned to the lowest and highest of neighbours, so that no spike is lost


STEP = Axis("step")


def token_axis(highest: float) -> Axis:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if highest >= 2 * size:
            return Axis("tokens", size, unit, "{:.4g}".format)
    return Axis("tokens")


def time_axis(highest_s: float) -> Axis:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if highest_s >= 2 * size:
            return Axis("time", size, unit, "{:.4g}".format)
    return Axis("time", 1.0, "s", "{:.4g}".format)


def render_chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    log: bool = False,
    show: Callable[[float], str] = "{:.4g}".format,
    axis: Axis = STEP,
    from_zero: bool = False,
) -> str:
    """A figure with axes, gridlines and a legend, "" without a point to draw. `show` formats values of y.

    With `log`, y must be above 0: what is not is left out. from_zero: the y axis begins there, so that noise looks small.
    """
    drawn = [(line, *_reduce(line, log)) for line in lines]
    drawn = [(line, x, y) for line, x, y in drawn if x.size]
    if not drawn:
        return ""
    # Of all points, not of means: charts side by side agree.
    x_high = max(float(np.nanmax(line.x)) for line, _, _ in drawn) or 1.0
    values = [y for _, _, y in drawn] + ([np.zeros(1)] if from_zero else [])
    y_low, y_high = _bounds(np.concatenate(values), log)

    def place_x(x: Floats) -> Floats:
        return LEFT + x / x_high * (WIDTH - LEFT - RIGHT)

    def place_y(y: Floats) -> Floats:
        low, high = (math.log(y_low), math.log(y_high)) if log else (y_low, y_high)
        return HEIGHT - BOTTOM - ((np.log(y) if log else y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in log_ticks(y_low, y_high) if log else ticks(y_low, y_high):
        at = round(float(place_y(np.array(tick))), 1)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(show(tick))}</text>'
        )
    for tick in ticks(0.0, x_high / axis.size):
        at = round(float(place_x(np.array(tick * axis.size))), 1)
        label = axis.show(tick) + (f" {axis.unit}" if axis.unit and tick else "")
        parts.append(
            f'<text class="tick" x="{at}" y="{HEIGHT - 14}" text-anchor="middle">{escape(label)}</text>'
        )
    for line, x, y in drawn:
        px, py = place_x(x).tolist(), place_y(y).tolist()
        # A hundredth of a pixel: the script reads the values back from these.
        path = " ".join(f"{a:.1f},{b:.2f}" for a, b in zip(px, py, strict=True))
        parts.append(
            f'<polyline class="{line.style}" data-label="{escape(line.label, quote=True)}" points="{path}"/>'
        )
        for a, b, v, w in zip(px, py, x.tolist(), y.tolist(), strict=True) if line.dots else ():
            where = f"{axis.name} {axis.show(v / axis.size)} {axis.unit}".rstrip()
            tip = escape(f"{line.label}, {where}: {show(w)}")
            parts.append(
                f'<circle class="{line.style}" cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{tip}</title></circle>'
            )
    labels = [f'<span class="{line.style}">{escape(line.label)}</span>' for line, _, _ in drawn]
    legend = "".join(labels) if len(labels) > 1 else ""
    scale = {
        "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM, "width": WIDTH,
        "x": x_high / axis.size, "low": y_low, "high": y_high, "log": log, "axis": axis.name, "unit": axis.unit,
    }  # fmt: skip
    label = escape(f"{title} by {axis.name}", quote=True)
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {escape(unit)}<i>{legend}</i></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'data-scale="{escape(json.dumps(scale), quote=True)}">{"".join(parts)}</svg></figure>'
    )


def thin(x: Floats, y: Floats, most: int = MOST_POINTS) -> tuple[Floats, Floats]:
    """At most `most` points, each the mean of as many neighbours as the others; the ends of x stay within reach."""
    if x.size <= most:
        return x, y
    size = math.ceil(x.size / most)
    starts = np.arange(0, x.size, size)
    counts = np.diff(np.append(starts, x.size))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def thin_to_extremes(x: Floats, y: Floats, most: int = MOST_POINTS) -> tuple[Floats, Floats]:
    """At most `most` of the points: the lowest and the highest of as many neighbours, in their order."""
    if x.size <= most:
        return x, y
    size = math.ceil(x.size / (most // 2))
    full = x.size // size * size
    groups = y[:full].reshape(-1, size)
    begin = np.arange(0, full, size)
    kept = np.concatenate([begin + groups.argmin(1), begin + groups.argmax(1)])
    if full < x.size:
        kept = np.append(kept, [full + y[full:].argmin(), full + y[full:].argmax()])
    kept = np.unique(kept)
    return x[kept], y[kept]


def smooth(y: Floats, window: int) -> Floats:
    """The running mean over the last `window` values."""
    total = np.cumsum(y)
    total[window:] -= total[:-window].copy()
    return total / np.minimum(np.arange(1, y.size + 1), window)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from `low` to `high`."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers that read well on a logarithmic axis, fewer to a power of ten the more of those there are."""
    factors = (1, 10) if high / low > 1e4 else (1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = sorted({f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high})
    return found if len(found) >= 3 else [tick for tick in ticks(low, high) if tick > 0]


def _reduce(line: Line, log: bool) -> tuple[Floats, Floats]:
    """The points to draw of it."""
    good = np.isfinite(line.x) & np.isfinite(line.y)
    if log:
        good &= np.where(good, line.y, 0.0) > 0
    return (thin_to_extremes if line.extremes else thin)(line.x[good], line.y[good])


def _bounds(values: Floats, log: bool) -> Point:
    """The range to draw, with a little room, never empty."""
    low, high = float(values.min()), float(values.max())
    if log:
        return (low / 1.05, high * 1.05) if high > low * 1.001 else (low / 2, high * 2)
    room = (high - low) * 0.05 or abs(high) * 0.5 or 1.0
    return (low - room if low < 0 or low > room else 0.0), high + room
