"""The runs of a machine as a table: how far each is, how fast, when it will end, what it takes of GPU and disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from provision.host import Host
from provision.machine import Machine
from provision.preflight import demand_installed
from provision.transfer import human
from provision.units import variables

# One line a fact: `run ID`, then what is true of it. Of metrics.jsonl the end is enough: samples are short.
TABLE = r"""
home=$(getent passwd "$user" | cut -d: -f6)
folder=$home/$name
at=$folder; [ -e "$at" ] || at=$home
echo "free $(df --block-size=1 --output=avail "$at" | tail -n 1)"
timeout 20 nvidia-smi "--query-gpu=$cards" --format=csv,noheader,nounits 2>/dev/null | while read -r line; do
  echo "gpu $line"
done || true
for run in "$folder"/runs/*/; do
  [ -e "$run/id" ] || continue
  cd "$run"
  run=${run%/}
  echo "run ${run##*/}"
  [ ! -e hosts ] || echo "hosts $(head -c 2000 hosts)"
  [ ! -e reached ] || echo "reached $(head -c 100 reached)"
  echo "unit $(systemctl is-active "metal-run-${run##*/}.service" || true)"
  [ ! -e status ] || echo "status $(head -c 20 status)"
  [ ! -e stop ] || echo "stop"
  echo "bytes $(du -sb . | cut -f 1)"
  if [ -e metrics.jsonl ]; then
    rows=$(tail -c 100000 metrics.jsonl)
    echo "step $(grep '"kind": "step"' <<<"$rows" | tail -n 1 || true)"
    echo "eval $(grep '"kind": "eval"' <<<"$rows" | tail -n 1 || true)"
  fi
  newest=
  for state in checkpoints/step-*/state.json; do [ ! -e "$state" ] || newest=$state; done
  [ -z "$newest" ] || echo "state $(tr -d '\n' <"$newest")"
  [ ! -e config.toml ] || echo "config $(grep -m 1 '^steps' config.toml || true)"
done
"""
CARDS = "index,name,utilization.gpu,memory.used,memory.total,temperature.gpu,power.draw"


@dataclass(frozen=True)
class Row:
    """A run. None where it is not known: no step yet, no pace."""

    run: str
    state: str
    step: int
    steps: int | None
    loss: float | None  # nats a token, of the last step
    val_loss: float | None
    tokens_per_s: float | None
    eta_s: float | None  # only of a run at work
    sensors: str  # of the GPU, as the run saw them last
    size_bytes: int


@dataclass(frozen=True)
class Status:
    rows: tuple[Row, ...]
    free_bytes: int
    cards: tuple[str, ...]  # a line for each GPU


def show_runs(host: Host, machine: Machine) -> RenderableType:
    """One exec."""
    demand_installed(host)
    values = variables(user=machine.user.name, name=machine.train.folder, cards=CARDS)
    return render_status(machine.name, parse_status(host.look(values + TABLE).stdout, machine.name))


def parse_status(text: str, name: str = "") -> Status:
    """What TABLE printed on machine `name`. Half a line of JSON is taken for none."""
    free_bytes, cards, found = 0, [], list[dict[str, str]]()
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "free":
            free_bytes = int(rest)
        elif word == "gpu":
            cards.append(describe_card(rest))
        elif word == "run":
            found.append({"run": rest})
        elif found:
            found[-1][word] = rest
    return Status(tuple(parse_row(facts, name) for facts in found), free_bytes, tuple(cards))


def parse_row(facts: dict[str, str], name: str) -> Row:
    step, score, state = (load_object(facts.get(name, "")) for name in ("step", "eval", "state"))
    reached = facts.get("reached", "").removeprefix("step-")
    done = int(step.get("step", state.get("step", reached if reached.isdecimal() else 0)))
    planned = number(state.get("steps")) or number(facts.get("config", "").partition("=")[2])
    steps = None if planned is None else int(planned)
    pace, tokens = number(step.get("tokens_per_s")), number(step.get("tokens"))
    at_work = facts.get("unit") in ("active", "activating", "reloading") and "status" not in facts
    eta_s = None
    if at_work and pace and tokens and steps and done:
        eta_s = (steps - done) * tokens / done / pace
    return Row(
        run=facts["run"],
        state=describe_state(facts, done, steps) + describe_others(facts.get("hosts", "").split(), name),
        step=done,
        steps=steps,
        loss=number(step.get("loss")),
        val_loss=number(score.get("val_loss")),
        tokens_per_s=pace if at_work else None,
        eta_s=eta_s,
        sensors=describe_sensors(step) if at_work else "",
        size_bytes=int(facts.get("bytes") or 0),
    )


def describe_state(facts: dict[str, str], step: int, steps: int | None) -> str:
    """One or two words. A run without a status that is not at work was cut short: the unit is not there any more."""
    status = facts.get("status")
    if status is None:
        begun = "training" if step else "starting"
        at_work = {"active": begun, "activating": "restarting", "deactivating": "saving", "reloading": begun}
        return at_work.get(facts.get("unit", ""), "cut short")
    if "stop" in facts:
        return "stopped"
    if status.strip() != "0":
        return f"failed ({status.strip()})"
    return "done" if steps is not None and step >= steps else "stopped"


def describe_others(hosts: Sequence[str], name: str) -> str:
    """Of a run over several machines, the first of which has all that there is to see."""
    if not hosts:
        return ""
    others = [host for host in hosts if host != name]
    return f", with {' '.join(others)}" if hosts[0] == name else f", led by {hosts[0]}"


def describe_sensors(step: dict[str, Any]) -> str:
    units = (("memory_bytes", human), ("temperature_c", "{:.0f} °C".format), ("power_w", "{:.0f} W".format))
    return " ".join(show(step[name]) for name, show in units if number(step.get(name)) is not None)


def describe_card(line: str) -> str:
    """A line of nvidia-smi with CARDS, for people; as it came where it is of another form."""
    match line.split(", "):
        case [index, name, used, memory, total, temperature, power]:
            sizes = f"{memory} of {total} MiB"
            return f"GPU {index} {name}: {used} % busy, {sizes}, {temperature} °C, {power} W"
    return line


def load_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def number(value: object) -> float | None:
    """What a file on the host gives as a number, if it is one."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def render_status(name: str, status: Status) -> RenderableType:
    table = Table("run", "state", box=None)
    for title in ("step", "loss", "val", "tok/s", "ETA", "GPU", "disk"):
        table.add_column(title, justify="right")
    for column in table.columns:
        column.no_wrap = True
    for row in sorted(status.rows, key=lambda row: row.run):
        steps = "" if row.steps is None else f"/{row.steps}"
        table.add_row(
            Text(row.run),
            row.state,
            f"{row.step}{steps}" if row.step else "",
            shown(row.loss, "{:.4f}"),
            shown(row.val_loss, "{:.4f}"),
            shown(row.tokens_per_s, "{:,.0f}"),
            "" if row.eta_s is None else duration(row.eta_s),
            row.sensors,
            human(row.size_bytes),
        )
    lines = [*status.cards, f"{human(status.free_bytes)} free on the disk of {name}"]
    body: Sequence[RenderableType] = [table] if status.rows else [Text(f"No run on {name} yet.")]
    return Group(*body, *(Text(line, style="dim") for line in lines))


def shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def duration(seconds: float) -> str:
    """0:07, 12:34, 1:02:03, 3 d 4:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
