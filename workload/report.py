"""report.html: what a run did, in one file that needs nothing else, not even a script."""

import json
import tomllib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from workload.charts import Line, Point, render_chart, smooth
from workload.metrics import Row, load_rows
from workload.progress import format_duration

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --line: #e3e7ee; --card: #ffffff; --page: #f5f6f9;
        --a: #2f6fde; --b: #d9622b; --faint: #2f6fde55 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c3340; --card: #181c24; --page: #10131a;
          --a: #6ea1ff; --b: #ff9a62; --faint: #6ea1ff55 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 16px; margin: 34px 0 10px }
.soft, figcaption, .tick { color: var(--soft) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0 }
.tile, figure, pre, table, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.tile { padding: 12px 16px } .tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: 13px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 14px }
figure { margin: 0; padding: 12px 14px 4px } figcaption { font-size: 13px } figcaption b { color: var(--ink) }
figcaption i { float: right; font-style: normal } figcaption i span { margin-left: 12px }
figcaption i span::before { content: "\\25CF\\00a0" }
svg { width: 100%; height: auto; display: block } .grid { stroke: var(--line) } .tick { font-size: 11px; fill: var(--soft) }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
polyline.a { stroke: var(--a) } polyline.b { stroke: var(--b) } polyline.faint { stroke: var(--faint); stroke-width: 1 }
circle.a { fill: var(--a) } circle.b { fill: var(--b) }
span.a { color: var(--a) } span.b { color: var(--b) } span.faint { color: var(--faint) }
pre { padding: 14px 16px; white-space: pre-wrap; overflow-wrap: anywhere; font: 13.5px/1.5 ui-monospace, monospace }
pre b { color: var(--a) } details { padding: 8px 16px; margin-top: 8px } details pre { border: 0; padding: 0 }
summary { cursor: pointer }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px; align-items: start }
table { border-spacing: 0; width: 100%; padding: 8px 14px; font-size: 13.5px } td { padding: 2px 0; vertical-align: top }
td + td { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere } th { text-align: left }
"""


def save_report(out: Path) -> Path:
    """Write the report of the run in `out`, from its files alone, at once or not at all; returns its path."""
    config = tomllib.loads((out / "config.toml").read_text(encoding="utf-8"))
    starts = list(load_rows(out / "starts.jsonl"))
    text = render_report(out.resolve().name, config, list(load_rows(out / "metrics.jsonl")), starts)
    staging = out / ".report.html.partial"
    staging.write_text(text, encoding="utf-8")
    staging.replace(out / "report.html")
    return out / "report.html"


def render_report(name: str, config: dict[str, Any], rows: Sequence[Row], starts: Sequence[Row]) -> str:
    """The page. `rows` are those of metrics.jsonl, `starts` those of starts.jsonl."""
    steps = [row for row in rows if row["kind"] == "step"]
    evals = [row for row in rows if row["kind"] == "eval"]
    environment = starts[-1]["environment"] if starts else ""
    parts = [
        f"<h1>{escape(name)}</h1><div class=soft>{escape(environment)}</div>",
        _tiles(config, steps, evals, starts),
        f'<div class="charts">{"".join(_charts(steps, evals))}</div>',
        _samples([row for row in rows if row["kind"] == "sample"]),
        _events(rows, starts),
        "<h2>Configuration</h2><div class=tables>",
        *(_table(section, values) for section, values in config.items()),
        "</div>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>'
        f'{escape(name)}</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _tiles(config: dict[str, Any], steps: Sequence[Row], evals: Sequence[Row], starts: Sequence[Row]) -> str:
    tiles = []
    if starts:
        tiles.append((f"{starts[-1]['parameters']:,}", "parameters"))
    if steps:
        last = steps[-1]
        rates = sorted(row["tokens_per_s"] for row in steps)
        tiles += [
            (f"{last['step']:,}", f"steps of {config['train']['steps']:,} asked for"),
            (f"{last['tokens']:,}", "tokens seen"),
            (f"{rates[len(rates) // 2]:,.0f}", "tokens/s, median"),
            (format_duration(last["elapsed_s"]), "time"),
        ]
    if evals:
        best = min(evals, key=lambda row: float(row["val_loss"]))
        tiles += [
            (
                f"{best['val_loss']:.4f}",
                f"best validation loss, at step {best['step']:,}; {evals[0]['val_loss']:.4f} at first",
            ),
            (
                f"{best['val_bits_per_byte']:.4f}",
                f"bits per byte; {evals[0]['val_bits_per_byte']:.4f} at first",
            ),
        ]
    cells = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles
    )
    return f"<div class=tiles>{cells}</div>"


def _charts(steps: Sequence[Row], evals: Sequence[Row]) -> list[str]:
    def points(rows: Sequence[Row], key: str) -> list[Point]:
        return [(row["step"], row[key]) for row in rows if row[key] is not None]

    losses, rates = points(steps, "loss"), points(steps, "tokens_per_s")
    window = max(5, len(steps) // 50)
    loss = [
        Line("each step", "faint", losses),
        Line("training", "a", smooth(losses, window)),
        Line("validation", "b", points(evals, "val_loss"), dots=True),
    ]
    bits = [Line("validation", "b", points(evals, "val_bits_per_byte"), dots=True)]
    return [
        render_chart("Loss", "nats a token", loss, log=True),
        render_chart("Bits per byte", "of text", bits, log=True),
        render_chart("Learning rate", "", [Line("AdamW", "a", points(steps, "lr"))], show="{:.1e}".format),
        render_chart(
            "Gradient norm", "before clipping", [Line("each step", "a", points(steps, "grad_norm"))], log=True
        ),
        render_chart(
            "Speed",
            "tokens/s",
            [Line("each step", "faint", rates), Line("mean", "a", smooth(rates, window))],
            show="{:,.0f}".format,
        ),
    ]


def _samples(samples: Sequence[Row]) -> str:
    """The newest in full, the others folded up, newest first."""
    if not samples:
        return ""

    def text(row: Row) -> str:
        return f"<pre><b>{escape(row['prompt'])}</b>{escape(row['text'])}</pre>"

    *older, newest = samples
    folded = [
        f"<details><summary>step {row['step']:,}</summary>{text(row)}</details>" for row in reversed(older)
    ]
    return f"<h2>Sample after step {newest['step']:,}</h2>{text(newest)}{''.join(folded)}"


def _events(rows: Sequence[Row], starts: Sequence[Row]) -> str:
    """What was out of the ordinary: events, and starts after the first."""
    lines = [f"step {row['step']:,}: {row['text']}" for row in rows if row["kind"] == "event"]
    lines += [f"step {row['from_step']:,}: resumed on {row['environment']}" for row in starts[1:]]
    return f"<h2>Events</h2><pre>{escape(chr(10).join(lines))}</pre>" if lines else ""


def _table(title: str, values: dict[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{escape(key)}<td>{escape(json.dumps(value, ensure_ascii=False))}"
        for key, value in values.items()
    )
    return f"<table><tr><th colspan=2>{escape(title)}{cells}</table>"
