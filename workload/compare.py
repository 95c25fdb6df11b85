"""compare.html: several runs in one file that needs nothing else: curves over each other, and what differs.

The switch between step, tokens and time is plain HTML and CSS; all three sets of curves are in the page.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from workload.charts import STEP, Axis, Floats, Line, render_chart, time_axis, token_axis
from workload.files import replace_text
from workload.metrics import number
from workload.page import COLOURS, render_page, render_time
from workload.panel import format_duration
from workload.report import Record, best_eval, format_count, load_record, median, smooth_column

Cell = tuple[str, float]  # text, and the number by which the best of a column is found; NaN: none is
LEFT_OUT = ("train.sample_prompt",)  # of what differs: says nothing about the training

COMPARE_STYLE = """<style>
.switch { display: inline-flex; margin: 18px 0 12px; border: 1px solid var(--line); border-radius: 99px; overflow: hidden; background: var(--card) }
.switch label { padding: 4px 14px; cursor: pointer; font-size: 13px; color: var(--soft) }
.pick { position: absolute; opacity: 0 } .by { display: none }
#by-step:checked ~ .by-step, #by-tokens:checked ~ .by-tokens, #by-time:checked ~ .by-time { display: block }
#by-step:checked ~ .switch [for=by-step], #by-tokens:checked ~ .switch [for=by-tokens], #by-time:checked ~ .switch [for=by-time]
  { background: var(--a); color: var(--card) }
.pick:focus-visible ~ .switch { outline: 2px solid var(--a) }
.wide { overflow-x: auto; margin-top: 18px } .wide table { border: 0; width: auto; min-width: 100%; background: none }
.wide td, .wide th { padding: 3px 14px 3px 0; white-space: nowrap; text-align: right } .wide tr > :first-child { text-align: left }
.wide th { color: var(--soft); font-weight: 500 } .wide td b { color: var(--good) } .wide td:first-child span { color: var(--ink) }
.wide td:first-child::before { content: "\\25CF\\00a0" }
"""
COMPARE_STYLE += (
    "".join(f"td.c{i} {{ color: var(--c{i % COLOURS}) }} " for i in range(3 * COLOURS)) + "</style>"
)


def save_comparison(runs: Sequence[Path], path: Path, written: datetime) -> Path:
    """Write the comparison of the runs in these folders, at once or not at all. Raises WorkloadError for what is no run."""
    text = render_comparison(name_apart([load_record(run) for run in runs], runs), written)
    replace_text(path, text, durable=False)
    return path


def name_apart(records: Sequence[Record], runs: Sequence[Path]) -> list[Record]:
    """The same, of which those with one name are called by as much of their paths as tells them apart."""
    paths = [run.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    for record, name in zip(records, names, strict=True):
        record.name = name
    return list(records)


def render_comparison(records: Sequence[Record], written: datetime) -> str:
    """The page."""
    highest = {
        name: max((record.log.steps[name][-1] for record in records if record.log.steps["step"]), default=0.0)
        for name in ("tokens", "elapsed_s")
    }
    axes = {
        "step": STEP,
        "tokens": token_axis(highest["tokens"]),
        "time": time_axis(highest["elapsed_s"]),
    }
    picks = "".join(
        f'<input class=pick type=radio name=by id="by-{name}"{" checked" if name == "step" else ""}>'
        for name in axes
    )
    labels = "".join(f'<label for="by-{name}">by {name}</label>' for name in axes)
    parts = [
        COMPARE_STYLE,
        f"<h1>{len(records)} runs</h1><div class=soft>written {render_time(written)}</div>",
        _table(records),
        f"<div>{picks}<div class=switch>{labels}</div>",
        *(
            f'<div class="by by-{name}"><div class=charts>{"".join(_charts(records, name, axis))}</div></div>'
            for name, axis in axes.items()
        ),
        "</div>",
        _samples(records),
    ]
    return render_page("Comparison of " + ", ".join(record.name for record in records), "\n".join(parts))


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Keys (section.key) of which the values are not all the same, with each one's value; None where it has none."""
    flat = [
        {f"{section}.{key}": value for section, values in config.items() if isinstance(values, dict)
         for key, value in values.items()}
        for config in configs
    ]  # fmt: skip
    keys = dict.fromkeys(key for values in flat for key in values)
    found = {key: [values.get(key) for values in flat] for key in keys if key not in LEFT_OUT}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def place(record: Record, axis: str, steps: Floats) -> Floats:
    """Where the run's `steps` are on an axis: the tokens seen or the seconds gone by then; NaN after its last step."""
    if axis == "step":
        return steps
    known, seen = record.column("step"), record.column("tokens" if axis == "tokens" else "elapsed_s")
    good = np.isfinite(known) & np.isfinite(seen)
    if not good.any():
        return np.full(steps.shape, np.nan)
    # Rows go on from 0 at step 0, and an evaluation stands where the step before it ended.
    at: Floats = np.interp(steps, np.append(0.0, known[good]), np.append(0.0, seen[good]), right=np.nan)
    return at


def _charts(records: Sequence[Record], name: str, axis: Axis) -> list[str]:
    def style(i: int) -> str:
        return f"c{i % (3 * COLOURS)}"

    def each(column: str, scale: float = 1.0) -> list[Line]:
        return [
            Line(record.name, style(i), *smooth_column(place(record, name, record.column("step")), record.column(column) * scale))
            for i, record in enumerate(records)
        ]  # fmt: skip

    def scored(key: str) -> list[Line]:
        lines = []
        for i, record in enumerate(records):
            rows = record.log.evals
            steps = np.array([number(row, "step") for row in rows], dtype=np.float64)
            values = np.array([number(row, key) for row in rows], dtype=np.float64)
            lines.append(Line(record.name, style(i), place(record, name, steps), values, dots=True))
        return lines

    rates = [
        Line(record.name, style(i), place(record, name, record.column("step")), record.column("lr"))
        for i, record in enumerate(records)
    ]
    whole: Callable[[float], str] = "{:,.0f}".format
    return [
        render_chart("Validation loss", "nats a token", scored("val_loss"), log=True, axis=axis),
        render_chart("Training loss", "nats a token, mean", each("loss"), log=True, axis=axis),
        render_chart(
            "Bits per byte", "of the validation text", scored("val_bits_per_byte"), log=True, axis=axis
        ),
        render_chart("Learning rate", "", rates, show="{:.1e}".format, axis=axis),
        render_chart("Gradient norm", "before clipping, mean", each("grad_norm"), log=True, axis=axis),
        render_chart("Speed", "tokens/s, mean", each("tokens_per_s"), show=whole, axis=axis, from_zero=True),
        render_chart("MFU", "% of the device's peak", each("mfu", 100.0), axis=axis, from_zero=True),
        render_chart("GPU memory", "GB in use", each("memory_bytes", 1e-9), axis=axis, from_zero=True),
    ]


def _table(records: Sequence[Record]) -> str:
    """A row a run: what came of it, then the settings in which they differ. The best of a column is marked."""
    columns: dict[str, tuple[list[Cell], Callable[[Sequence[float]], float] | None]] = {
        "best validation loss": ([_best(record, "val_loss") for record in records], min),
        "bits/byte": ([_best(record, "val_bits_per_byte") for record in records], min),
        "at step": ([_best(record, "step", "{:,.0f}".format) for record in records], None),
        "steps": ([_last(record, "step", "{:,.0f}".format) for record in records], None),
        "tokens": ([_last(record, "tokens", format_count) for record in records], None),
        "tokens/s": ([_median(record, "tokens_per_s", "{:,.0f}".format) for record in records], max),
        "MFU": ([_median(record, "mfu", "{:.1%}".format) for record in records], max),
        "time": ([_last(record, "elapsed_s", format_duration) for record in records], None),
    }
    for key, values in differences([record.config for record in records]).items():
        columns[key] = (
            [("" if v is None else json.dumps(v, ensure_ascii=False), math.nan) for v in values],
            None,
        )
    machines = [str(record.starts[-1].get("environment", "")) if record.starts else "" for record in records]
    if len(set(machines)) > 1:
        columns["machine"] = ([(machine, math.nan) for machine in machines], None)
    columns = {title: column for title, column in columns.items() if any(text for text, _ in column[0])}
    head = "".join(f"<th>{escape(title)}" for title in columns)
    rows = []
    for i, record in enumerate(records):
        cells = []
        for values, choose in columns.values():
            finite = [value for _, value in values if math.isfinite(value)]
            text, value = values[i]
            best = choose is not None and len(finite) > 1 and value == choose(finite)
            cells.append(f"<td><b>{escape(text)}</b>" if best else f"<td>{escape(text)}")
        rows.append(
            f'<tr><td class="c{i % (3 * COLOURS)}"><span>{escape(record.name)}</span>{"".join(cells)}'
        )
    return f"<div class=wide><table><tr><th>run{head}{''.join(rows)}</table></div>"


def _cell(value: float, show: Callable[[float], str]) -> Cell:
    return (show(value), value) if math.isfinite(value) else ("", math.nan)


def _best(record: Record, key: str, show: Callable[[float], str] = "{:.4f}".format) -> Cell:
    row = best_eval(record.log)
    return _cell(math.nan if row is None else number(row, key), show)


def _last(record: Record, column: str, show: Callable[[float], str]) -> Cell:
    values = record.log.steps[column]
    return _cell(values[-1] if values else math.nan, show)


def _median(record: Record, column: str, show: Callable[[float], str]) -> Cell:
    return _cell(median(record.column(column)), show)


def _samples(records: Sequence[Record]) -> str:
    """The last of each."""
    folded = [
        f"<details><summary>{escape(record.name)}, step {row['step']:,}</summary>"
        f"<pre><b>{escape(str(row.get('prompt', '')))}</b>{escape(str(row.get('text', '')))}</pre></details>"
        for record in records
        for row in record.log.samples[-1:]
    ]
    return f"<h2>Last samples</h2>{''.join(folded)}" if folded else ""
