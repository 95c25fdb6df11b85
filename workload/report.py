"""report.html: what a run did, or does, in one file that needs nothing else.

While the run goes on a browser loads the page again by itself; it says when it was written and how the run stands.
"""

import json
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np

from workload.charts import Floats, Line, render_chart, smooth
from workload.errors import WorkloadError
from workload.files import is_held, replace_text
from workload.metrics import Log, Row, number, parse_row
from workload.page import STYLE, render_page, render_time
from workload.panel import format_duration

__all__ = ["STYLE", "LiveReport", "Record", "load_record", "render_report", "save_report"]

Status = Literal["at work", "stopped", "finished"]
MOST_SAMPLES, MOST_EVENTS = 60, 300
EVERY_S = 15.0  # between two reports of a run at work
COST = 0.01  # of the time since the last one, at most


@dataclass
class Record:
    """The files of a run, read."""

    name: str
    config: dict[str, Any]
    log: Log
    starts: list[Row]  # of starts.jsonl

    def column(self, name: str) -> Floats:
        return np.array(self.log.steps[name])


def load_record(out: Path) -> Record:
    """Raises WorkloadError when `out` is no run."""
    try:
        config = tomllib.loads((out / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkloadError(
            f"{out}: cannot read config.toml, so not a run: {error}", "name a folder below runs/"
        ) from error
    return Record(out.resolve().name, config, Log(out / "metrics.jsonl").read(), _load_starts(out))


def _load_starts(out: Path) -> list[Row]:
    path = out / "starts.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [row for row in map(parse_row, lines) if row is not None]


def save_report(out: Path, status: Status | None = None) -> Path:
    """Write the report of the run in `out`, from its files alone, at once or not at all; returns its path.

    status: how the run stands, where the caller knows; else it is looked for.
    """
    return _write(out, load_record(out), status)


def _write(out: Path, record: Record, status: Status | None) -> Path:
    text = render_report(record, status or find_status(out, record), datetime.now(UTC))
    replace_text(out / "report.html", text, durable=False)  # it can be made again
    return out / "report.html"


def find_status(out: Path, record: Record) -> Status:
    """Finished when the newest checkpoint says so, at work while a process of this computer trains it, else stopped."""
    steps = record.log.steps["step"]
    planned = [float(record.config.get("train", {}).get("steps", np.inf))]
    for state in sorted(out.glob("checkpoints/step-*/state.json"))[-1:]:
        planned += [number(parse_row(state.read_bytes()) or {}, "steps")]  # fewer, when the time is limited
    if steps and any(steps[-1] >= plan for plan in planned):
        return "finished"
    return "at work" if is_held(out) else "stopped"


class LiveReport:
    """The report of a run at work, written as often as costs next to nothing.

    Only rows that are new are read; a report waits until EVERY_S have gone by, and a hundred times what the last one
    took. So it never takes more than COST of the time, however long the run.
    """

    def __init__(self, out: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out, clock
        self._record: Record | None = None
        self._due = clock() + EVERY_S

    def step(self) -> None:
        """Write it when it is due. To be called after any step; costs a look at the clock otherwise."""
        if self._clock() < self._due:
            return
        try:
            self.save("at work")
        except OSError:  # a full disk: whether the run can go on is for its checkpoints to say
            self._due = self._clock() + EVERY_S

    def save(self, status: Status) -> None:
        begun = self._clock()
        if self._record is None:
            self._record = load_record(self._out)
        else:
            self._record.log.read()
        _write(self._out, self._record, status)
        now = self._clock()
        self._due = now + max(EVERY_S, (now - begun) / COST)


def render_report(record: Record, status: Status, written: datetime) -> str:
    """The page."""
    log, starts = record.log, record.starts
    about = ""
    if starts:
        about = f"{number(starts[-1], 'parameters'):,.0f} parameters, on {starts[-1].get('environment', '')}"
    parts = [
        f"<h1>{escape(record.name)}<span class='pill {'work' if status == 'at work' else status}'>{status}</span></h1>",
        f"<div class=soft>{escape(about)}</div><div class=soft>written {render_time(written)}</div>",
        _tiles(record),
        f'<div class="charts">{"".join(_charts(record))}</div>',
        _samples(log.samples),
        _events(record),
        "<h2>Configuration</h2><div class=tables>",
        *(_table(section, values) for section, values in record.config.items() if isinstance(values, dict)),
        *([_table("environment", starts[-1])] if starts else []),
        "</div>",
    ]
    return render_page(record.name, "\n".join(parts), live=status == "at work")


def best_eval(log: Log) -> Row | None:
    """The evaluation with the lowest validation loss."""
    scored = [row for row in log.evals if np.isfinite(number(row, "val_loss"))]
    return min(scored, key=lambda row: number(row, "val_loss"), default=None)


def median(values: Floats) -> float:
    """Of those that are finite; NaN when none is."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else float("nan")


def _tiles(record: Record) -> str:
    """What a person asks first: how good, how far, how fast."""
    log, tiles = record.log, []
    best = best_eval(log)
    if best is not None:
        first = log.evals[0]
        tiles += [
            (
                f"{best['val_loss']:.4f}",
                f"best validation loss, at step {best['step']:,}; {number(first, 'val_loss'):.4f} at first",
            ),
            (
                f"{number(best, 'val_bits_per_byte'):.4f}",
                f"bits per byte; {number(first, 'val_bits_per_byte'):.4f} at first",
            ),
        ]
    if log.steps["step"]:
        step, tokens, elapsed_s = (log.steps[name][-1] for name in ("step", "tokens", "elapsed_s"))
        asked = record.config.get("train", {}).get("steps", 0)
        tiles += [
            (f"{step:,.0f}", f"steps of {asked:,} asked for"),
            (format_count(tokens), "tokens seen"),
            (f"{median(record.column('tokens_per_s')):,.0f}", "tokens/s, median"),
            (format_duration(elapsed_s), "time"),
        ]
        mfu, memory = median(record.column("mfu")), record.column("memory_bytes")
        if np.isfinite(mfu):
            tiles.append((f"{mfu:.1%}", "MFU, median"))
        if np.isfinite(memory).any():
            tiles.append((f"{np.nanmax(memory) / 1e9:.1f} GB", "GPU memory, highest"))
    cells = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles
    )
    return f"<div class=tiles>{cells}</div>"


def format_count(count: float) -> str:
    """943.7 M; below ten million all digits."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if count >= 10 * size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f}"


def points(rows: Sequence[Row], key: str) -> tuple[Floats, Floats]:
    """(step, value) of rows."""
    return np.array([number(row, "step") for row in rows]), np.array([number(row, key) for row in rows])


def smooth_column(x: Floats, y: Floats, window: int = 0) -> tuple[Floats, Floats]:
    """The running mean of what is finite; over a fiftieth of it when no window is given."""
    good = np.isfinite(y)
    x, y = x[good], y[good]
    return x, smooth(y, window or max(5, x.size // 50))


def _charts(record: Record) -> list[str]:
    log, steps = record.log, record.column("step")

    def each(name: str, scale: float = 1.0) -> list[Line]:
        y = record.column(name) * scale
        return [
            Line("each step", "faint", steps, y, extremes=True),
            Line("mean", "a", *smooth_column(steps, y)),
        ]

    loss = [
        Line("each step", "faint", steps, record.column("loss"), extremes=True),
        Line("training", "a", *smooth_column(steps, record.column("loss"))),
        Line("validation", "b", *points(log.evals, "val_loss"), dots=True),
    ]
    bits = [Line("validation", "b", *points(log.evals, "val_bits_per_byte"), dots=True)]
    whole = "{:,.0f}".format
    return [
        render_chart("Loss", "nats a token", loss, log=True),
        render_chart("Bits per byte", "of text", bits, log=True),
        render_chart(
            "Learning rate", "", [Line("lr", "a", steps, record.column("lr"))], show="{:.1e}".format
        ),
        render_chart("Gradient norm", "before clipping", each("grad_norm"), log=True),
        render_chart("Speed", "tokens/s", each("tokens_per_s"), show=whole, from_zero=True),
        render_chart("MFU", "% of the device's peak", each("mfu", 100.0), from_zero=True),
        *(
            render_chart(title, unit, [Line(title, "a", steps, record.column(name) * scale)], from_zero=True)
            for title, unit, name, scale in (
                ("GPU memory", "GB in use", "memory_bytes", 1e-9),
                ("GPU temperature", "°C", "temperature_c", 1.0),
                ("GPU power", "W", "power_w", 1.0),
            )
        ),
    ]


def _samples(samples: Sequence[Row]) -> str:
    """The newest in full, the others folded up, newest first."""
    if not samples:
        return ""

    def text(row: Row) -> str:
        return f"<pre><b>{escape(str(row.get('prompt', '')))}</b>{escape(str(row.get('text', '')))}</pre>"

    *older, newest = samples
    if len(older) > MOST_SAMPLES:  # of a long run, some at equal distances
        older = [older[i * len(older) // MOST_SAMPLES] for i in range(MOST_SAMPLES)]
    folded = [
        f"<details><summary>step {row['step']:,}</summary>{text(row)}</details>" for row in reversed(older)
    ]
    return f"<h2>Sample after step {newest['step']:,}</h2>{text(newest)}{''.join(folded)}"


def _events(record: Record) -> str:
    """What was out of the ordinary: events, starts after the first, and what of the log is not as it should be."""
    log = record.log
    events = [(number(row, "step"), str(row.get("text", ""))) for row in log.events]
    events += [
        (number(row, "from_step"), f"resumed on {row.get('environment', '')}") for row in record.starts[1:]
    ]
    events.sort(key=lambda event: event[0])
    lines = [f"step {step:,.0f}: {text}" for step, text in events]
    if len(lines) > MOST_EVENTS:
        lines = [f"({len(lines) - MOST_EVENTS:,} more before these)", *lines[-MOST_EVENTS:]]
    bad = record.column("step")[~np.isfinite(record.column("loss"))]
    if bad.size:
        lines.append(
            f"{bad.size:,} step{'s' * (bad.size > 1)} without a finite loss, the first is step {bad[0]:,.0f}"
        )
    if log.damaged:
        where = ", ".join(map(str, log.damaged[:5])) + (" …" if len(log.damaged) > 5 else "")
        lines.append(
            f"metrics.jsonl: lines that cannot be read and are left out, {len(log.damaged):,}: {where}"
        )
    return f"<h2>Events</h2><pre>{escape(chr(10).join(lines))}</pre>" if lines else ""


def _table(title: str, values: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{escape(key)}<td>{escape(json.dumps(value, ensure_ascii=False, default=str))}"
        for key, value in values.items()
    )
    return f"<table><tr><th colspan=2>{escape(title)}{cells}</table>"
