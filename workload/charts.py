"""Line charts as inline SVG: no library, no script needed to see them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 26, 12, 34
MOST_POINTS = 400  # a line; more cannot be told apart at this width


@dataclass(frozen=True)
class Line:
    """`style` is a class of the page's stylesheet."""

    label: str
    style: str
    points: Sequence[Point]
    dots: bool = False  # mark every point: for lines of few points


def render_chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    log: bool = False,
    show: Callable[[float], str] = "{:.4g}".format,
) -> str:
    """A figure with axes, gridlines and a legend; x is the step. Points that are not finite are left out.

    `show` formats values of y. With `log`, y must be above 0.
    """
    drawn = [
        Line(
            line.label,
            line.style,
            thin([p for p in line.points if math.isfinite(p[1]) and (p[1] > 0 or not log)]),
            line.dots,
        )
        for line in lines
    ]
    points = [point for line in drawn for point in line.points]
    if not points:
        return ""
    x_high = (
        max(x for line in lines for x, _ in line.points) or 1.0
    )  # not that of means: charts side by side agree
    y_low, y_high = _bounds([y for _, y in points], log)

    def place(point: Point) -> tuple[float, float]:
        x = LEFT + point[0] / x_high * (WIDTH - LEFT - RIGHT)
        low, high, y = (math.log(v) if log else v for v in (y_low, y_high, point[1]))
        return round(x, 1), round(HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for tick in log_ticks(y_low, y_high) if log else ticks(y_low, y_high):
        _, y = place((0.0, tick))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(show(tick))}</text>'
        )
    for tick in ticks(0.0, x_high):
        x, _ = place((tick, y_low))
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - 14}" text-anchor="middle">{tick:,.0f}</text>')
    for line in drawn:
        path = " ".join(f"{x},{y}" for x, y in map(place, line.points))
        parts.append(f'<polyline class="{line.style}" points="{path}"/>')
        for point in line.points if line.dots else ():
            x, y = place(point)
            tip = escape(f"{line.label}, step {point[0]:,.0f}: {show(point[1])}")
            parts.append(
                f'<circle class="{line.style}" cx="{x}" cy="{y}" r="3.5"><title>{tip}</title></circle>'
            )
    legend = "".join(
        f'<span class="{line.style}">{escape(line.label)}</span>' for line in drawn if line.points
    )
    label = escape(f"{title} by step", quote=True)
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {escape(unit)}<i>{legend}</i></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points, each the mean of as many neighbours as the others; the ends of x stay within reach."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """The running mean of y over the last `window` points."""
    out: list[Point] = []
    total = 0.0
    for i, (x, y) in enumerate(points):
        total += y - (points[i - window][1] if i >= window else 0.0)
        out.append((x, total / min(i + 1, window)))
    return out


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


def _bounds(values: Sequence[float], log: bool) -> Point:
    """The range to draw, with a little room, never empty."""
    low, high = min(values), max(values)
    if log:
        return (low / 1.05, high * 1.05) if high > low * 1.001 else (low / 2, high * 2)
    room = (high - low) * 0.05 or abs(high) * 0.5 or 1.0
    return (low - room if low < 0 or low > room else 0.0), high + room
