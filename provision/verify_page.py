"""The page of a machine's verifications: one file, no network, no script. Pure: records in, HTML out."""

from collections.abc import Sequence
from html import escape

from provision.history import Record

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --line: #e3e7ee; --card: #fff; --page: #f5f6f9;
        --good: #16855b; --bad: #c2255c; --a: #2f6fde }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c3340; --card: #181c24;
        --page: #10131a; --good: #4ccb94; --bad: #ff7fa8; --a: #6ea1ff } }
body { margin: 0 auto; max-width: 1100px; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 16px; margin: 34px 0 10px } .soft { color: var(--soft) }
table { border-spacing: 0; width: 100%; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
        padding: 8px 14px; font-size: 14px }
td, th { padding: 4px 10px 4px 0; text-align: left; vertical-align: top; overflow-wrap: anywhere }
.good { color: var(--good) } .bad { color: var(--bad); font-weight: 600 } .remedy { display: block; margin-top: 2px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px }
figure { margin: 0; padding: 10px 14px; background: var(--card); border: 1px solid var(--line); border-radius: 10px }
figcaption { font-size: 13px; color: var(--soft) } figcaption b { color: var(--ink); font-size: 16px }
svg { width: 100%; height: 46px; display: block } polyline { fill: none; stroke: var(--a); stroke-width: 2 }
circle { fill: var(--a) }
"""
WIDTH, HEIGHT, EDGE = 240, 46, 4
SHOWN = 60  # records in charts and the table: the newest


def render_verify_page(records: Sequence[Record]) -> str:
    """`records`: oldest first, at least one."""
    last = records[-1]
    shown = records[-SHOWN:]
    when = f"{last.began:%Y-%m-%d %H:%M} UTC"
    about = "; ".join(f"{name} {value}" for name, value in last.about.items() if value)
    body = [
        f"<h1>{escape(last.machine)} {verdict(last)}</h1>",
        f'<p class="soft">{when}, in {last.seconds:.0f} s; {escape(about)}</p>',
        *([f'<p class="soft">Left out: {escape(last.left_out)}.</p>'] if last.left_out else []),
        render_checks_table(last),
        "<h2>Measured</h2>",
        render_charts(shown),
        f"<h2>History, {len(records)} in all</h2>",
        render_history(shown),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(last.machine)} verified</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def verdict(record: Record) -> str:
    bad = sum(not entry.good for entry in record.entries)
    return f'<span class="bad">{bad} bad</span>' if bad else '<span class="good">good</span>'


def render_checks_table(record: Record) -> str:
    rows = []
    for entry in record.entries:
        word = "good" if entry.good else "bad"
        remedy = f'<span class="remedy">→ {escape(entry.remedy)}</span>' if entry.remedy else ""
        rows.append(
            f'<tr><td>{escape(entry.name)}</td><td class="{word}">{word}</td><td>{escape(entry.seen)}{remedy}</td></tr>'
        )
    return f"<table>{''.join(rows)}</table>"


def render_charts(records: Sequence[Record]) -> str:
    """A small chart for each figure that the newest records have, over time."""
    names = list(dict.fromkeys(name for record in reversed(records) for name in record.figures))
    charts = []
    for name in sorted(names):
        values = [record.figures[name] for record in records if name in record.figures]
        charts.append(
            f"<figure><figcaption>{escape(name.replace('_', ' '))}<br><b>{values[-1]:,.4g}</b></figcaption>"
            f"{render_line(values)}</figure>"
        )
    return f'<div class="charts">{"".join(charts)}</div>' if charts else '<p class="soft">Nothing yet.</p>'


def render_line(values: Sequence[float]) -> str:
    """The values in order, from 0 to the largest."""
    top = max(*values, 1e-12)
    step = (WIDTH - 2 * EDGE) / max(1, len(values) - 1)
    points = [
        (EDGE + index * step, HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * max(0.0, value) / top)
        for index, value in enumerate(values)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><polyline points="{line}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/></svg>'
    )


def render_history(records: Sequence[Record]) -> str:
    """A row for each, newest first: what was bad, and under which kernel."""
    rows = []
    for record in reversed(records):
        bad = ", ".join(entry.name for entry in record.entries if not entry.good)
        rows.append(
            f"<tr><td>{record.began:%Y-%m-%d %H:%M}</td><td>{verdict(record)}</td><td>{escape(bad)}</td>"
            f"<td>{escape(record.about.get('kernel', ''))}</td><td>{'quick' if record.left_out else ''}</td></tr>"
        )
    return f"<table><tr><th>when (UTC)</th><th></th><th>bad</th><th>kernel</th><th></th></tr>{''.join(rows)}</table>"
