"""The live panel of a run on a terminal: a pure function of what is known and of the room there is.

━━━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━━━━━━━  1,200/2,000   60%  eta 12:34
loss 3.2145  █▇▆▅▅▄▄▃▃▃▂▂▂▂▁▁▁
val 3.3012 (best 3.2999 at 1,000)  1.1034 bits/byte  lr 3.00e-04  grad 0.52
12,345 tok/s  mfu 41.2%  gpu 17.2 GB  61 °C  287 W  time 18:40
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
BOX_WIDTH, BOX_HEIGHT = 60, 9  # a terminal smaller than this keeps its room for values
SPARK_WIDTH = 60
Cell = tuple[str, str]  # (label, value)


@dataclass(frozen=True)
class View:
    """What there is to show. Losses in nats a token, rate in tokens/s, mfu 0 … 1; gpu as telemetry.py reads it."""

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    rate: float
    eta_s: float
    elapsed_s: float
    mfu: float | None = None
    gpu: Mapping[str, float] = field(default_factory=dict)
    val: tuple[float, float] | None = None  # the last validation: (loss, bits per byte)
    best: tuple[float, int] | None = None  # the lowest validation loss and its step
    losses: Sequence[float] = ()  # from the first to the last, thinned
    doing: str = ""  # what keeps it from training at the moment


def render_panel(view: View, width: int, height: int) -> RenderableType:
    """The panel for a terminal of `width` columns and `height` lines: what is least needed goes first."""
    boxed = width >= BOX_WIDTH and height >= BOX_HEIGHT
    room = width - 4 if boxed else width - 1  # the last column of a terminal wraps on some
    lines = [_bar(view, room), _loss(view, room), *pack(cells(view), room)]
    if not boxed:
        return Group(*lines[: max(1, height - 2)])
    return Panel(Group(*lines), border_style="dim", title=view.doing or None, title_align="left")


def cells(view: View) -> list[Cell]:
    """Everything but progress and loss, the most wanted first."""
    found: list[Cell] = []
    if view.val is not None:
        loss, bits = view.val
        best = f" (best {view.best[0]:.4f} at {view.best[1]:,})" if view.best and view.best[0] < loss else ""
        found += [("val", f"{loss:.4f}{best}"), ("", f"{bits:.4f} bits/byte")]
    found += [("", f"{view.rate:,.0f} tok/s")]
    found += [("lr", f"{view.lr:.2e}"), ("grad", f"{view.grad_norm:.2f}")]
    if view.mfu is not None:
        found += [("mfu", f"{view.mfu:.1%}")]
    return [*found, *gpu_cells(view.gpu), ("time", format_duration(view.elapsed_s))]


def gpu_cells(gpu: Mapping[str, float]) -> list[Cell]:
    """Memory in use, temperature and power, as far as the card says."""
    units: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("memory_bytes", "gpu", lambda v: f"{v / 1e9:.1f} GB"),
        ("temperature_c", "", lambda v: f"{v:.0f} °C"),
        ("power_w", "", lambda v: f"{v:.0f} W"),
    )
    return [(label, show(gpu[key])) for key, label, show in units if key in gpu]


def pack(found: Sequence[Cell], room: int) -> list[Text]:
    """Cells side by side, in order, in as many lines of `room` columns as they need."""
    lines: list[Text] = []
    for label, value in found:
        cell = Text.assemble((f"{label} ", "dim"), value) if label else Text(value)
        if lines and lines[-1].cell_len + 2 + cell.cell_len <= room:
            lines[-1] = Text.assemble(lines[-1], "  ", cell)
        else:
            cell.truncate(room, overflow="ellipsis")
            lines.append(cell)
    for line in lines:
        line.no_wrap = True
    return lines


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` blocks, each the mean of as many values, on a logarithmic scale; "" for fewer than two values."""
    values = [value for value in values if math.isfinite(value) and value > 0]
    if len(values) < 2 or width < 2:
        return ""
    size = math.ceil(len(values) / width)
    means = [
        sum(map(math.log, values[i : i + size])) / len(values[i : i + size])
        for i in range(0, len(values), size)
    ]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BLOCKS[min(7, int((mean - low) / span * 8))] for mean in means)


def format_duration(seconds: float) -> str:
    """0:07, 12:34, 1:02:03, 3 d 4:05:06."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bar(view: View, room: int) -> RenderableType:
    parts = [f"{view.step:,}/{view.steps:,}", f"eta {format_duration(view.eta_s)}"]
    if room >= 50:
        parts.insert(1, f"{view.step / max(view.steps, 1):4.0%}")
    text = "  ".join(parts)
    bar_width = room - len(text) - 2
    if bar_width < 8:
        line = Text(text, no_wrap=True)
        line.truncate(room)
        return line
    grid = Table.grid(padding=(0, 2, 0, 0))
    bar = ProgressBar(
        total=max(view.steps, 1),
        completed=view.step,
        width=bar_width,
        complete_style="cyan",
        finished_style="green",
    )
    grid.add_row(bar, Text(text))
    return grid


def _loss(view: View, room: int) -> Text:
    line = Text.assemble(("loss ", "dim"), (f"{view.loss:.4f}", "bold"), no_wrap=True)
    spark = sparkline(view.losses, min(SPARK_WIDTH, room - line.cell_len - 2))
    if spark:
        line.append("  ").append(spark, style="cyan")
    line.truncate(room)
    return line
