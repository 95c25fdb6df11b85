"""The frame of the pages that the workload writes: one file each, no network, all to be seen without the script.

The script reads values off a chart under the pointer, and reloads the page of a run that is at work.
"""

from datetime import UTC, datetime
from html import escape

RELOAD_S = 15
COLOURS = 8  # of runs side by side; from the next on they come again, dashed

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --line: #e3e7ee; --card: #ffffff; --page: #f5f6f9;
        --a: #2f6fde; --b: #d9622b; --faint: #2f6fde55; --good: #16855b; --warn: #b54708;
        --c0: #2f6fde; --c1: #d9622b; --c2: #16855b; --c3: #9b51e0; --c4: #b58900; --c5: #c2255c; --c6: #0c8599; --c7: #6b7280 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c3340; --card: #181c24; --page: #10131a;
          --a: #6ea1ff; --b: #ff9a62; --faint: #6ea1ff55; --good: #4ccb94; --warn: #f5a524;
          --c0: #6ea1ff; --c1: #ff9a62; --c2: #4ccb94; --c3: #c59bff; --c4: #e5c04b; --c5: #ff7fa8; --c6: #4dc6d8; --c7: #a3adbd } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere } h2 { font-size: 16px; margin: 34px 0 10px }
.soft, figcaption, .tick { color: var(--soft) }
.pill { font-size: 13px; font-weight: 500; border: 1px solid var(--line); border-radius: 99px; padding: 2px 10px; margin-left: 10px;
        vertical-align: 4px; color: var(--soft); white-space: nowrap; background: var(--card) }
.pill::before { content: "\\25CF\\00a0" } .pill.work { color: var(--good) } .pill.stopped, .pill.silent { color: var(--warn) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(124px, 1fr)); gap: 12px; margin: 20px 0 }
.tile, figure, pre, table, details, .wide { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.tile { padding: 12px 14px } .tile b { display: block; font-size: 19px; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: 13px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 14px }
figure { margin: 0; padding: 12px 14px 4px; position: relative } figcaption { font-size: 13px } figcaption b { color: var(--ink) }
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
.hair { stroke: var(--soft); stroke-dasharray: 2 3; pointer-events: none }
.tip { position: absolute; pointer-events: none; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 5px 9px;
       font-size: 12px; font-variant-numeric: tabular-nums; white-space: nowrap; box-shadow: 0 2px 10px #0002; z-index: 1; color: var(--ink) }
.tip div span::before { content: "\\25CF\\00a0" }
""" + "".join(
    f"polyline.c{i} {{ stroke: var(--c{i % COLOURS}) }} circle.c{i} {{ fill: var(--c{i % COLOURS}) }} "
    f"span.c{i} {{ color: var(--c{i % COLOURS}) }}"
    + (f" polyline.c{i} {{ stroke-dasharray: {2 + 3 * (i // COLOURS)} 3 }}" if i >= COLOURS else "")
    + "\n"
    for i in range(3 * COLOURS)
)

# Nothing here is needed to read the page: it adds values under the pointer, and the next state of a run at work.
SCRIPT = """
(() => {
  const nice = (v) => { const a = Math.abs(v);
    return a >= 1000 ? Math.round(v).toLocaleString("en") : a > 0 && a < 0.001 ? v.toExponential(2) : String(Number(v.toPrecision(4))); };
  document.querySelectorAll("svg[data-scale]").forEach((svg) => {
    const s = JSON.parse(svg.dataset.scale), lines = [];
    const tip = document.createElement("div"), hair = document.createElementNS(svg.namespaceURI, "line");
    tip.className = "tip"; tip.hidden = true; hair.setAttribute("class", "hair");
    svg.querySelectorAll("polyline").forEach((line) => lines.push({ label: line.dataset.label, style: line.getAttribute("class"),
      at: line.getAttribute("points").split(" ").map((p) => p.split(",").map(Number)) }));
    const value = (y) => { const part = (s.bottom - y) / (s.bottom - s.top);
      return s.log ? s.low * Math.pow(s.high / s.low, part) : s.low + (s.high - s.low) * part; };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * s.width;
      if (x < s.left - 4 || x > s.right + 4) return leave();
      const found = lines.map((l) => ({ l, p: l.at.reduce((best, p) => Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best) }));
      const near = found.reduce((best, f) => Math.abs(f.p[0] - x) < Math.abs(best.p[0] - x) ? f : best).p[0];
      tip.replaceChildren();
      const head = document.createElement("b");
      const where = (near - s.left) / (s.right - s.left) * s.x;
      head.textContent = s.axis + " " + (s.axis === "step" ? Math.round(where).toLocaleString("en") : nice(where) + " " + s.unit);
      tip.append(head);
      found.forEach(({ l, p }) => { if (Math.abs(p[0] - near) > 14) return;
        const row = document.createElement("div"), name = document.createElement("span");
        name.className = l.style; name.textContent = l.label;
        row.append(name, " " + nice(value(p[1]))); tip.append(row); });
      hair.setAttribute("x1", near); hair.setAttribute("x2", near); hair.setAttribute("y1", s.top); hair.setAttribute("y2", s.bottom);
      svg.append(hair); if (!tip.parentNode) svg.parentNode.append(tip); tip.hidden = false;
      const outer = svg.parentNode.getBoundingClientRect(), left = box.left - outer.left + near / s.width * box.width;
      tip.style.top = box.top - outer.top + 10 + "px";
      tip.style.left = (left > box.width / 2 ? left - tip.offsetWidth - 12 : left + 12) + "px";
    });
    const leave = () => { tip.hidden = true; hair.remove(); };
    svg.addEventListener("pointerleave", leave);
  });
  const pill = document.querySelector(".pill.work"), time = document.querySelector("time");
  if (!pill || !time) return;
  const key = "scroll " + location.pathname, was = sessionStorage.getItem(key);
  if (was !== null) scrollTo(0, Number(was));
  const age = (Date.now() - Date.parse(time.dateTime)) / 1000;
  if (age > 600) { pill.className = "pill silent"; pill.textContent = "no news for " + Math.round(age / 60) + " min"; }
  setTimeout(() => { sessionStorage.setItem(key, String(scrollY)); location.reload(); }, RELOAD_MS);
})();
""".replace("RELOAD_MS", str(RELOAD_S * 1000))


def render_page(title: str, body: str, *, live: bool = False) -> str:
    """A whole page. `live`: a browser loads it again every RELOAD_S seconds, by the script or without it."""
    reload = f'<noscript><meta http-equiv="refresh" content="{RELOAD_S * 2}"></noscript>' if live else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{reload}'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n<script>{SCRIPT}</script></body></html>\n"
    )


def render_time(when: datetime) -> str:
    when = when.astimezone(UTC)
    return f'<time datetime="{when:%Y-%m-%dT%H:%M:%SZ}">{when:%Y-%m-%d %H:%M:%S} UTC</time>'
