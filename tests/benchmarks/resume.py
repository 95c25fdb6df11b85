"""`kill -9` at random moments of a real training, resumed each time, and in the end the same as never interrupted.

    python -m tests.benchmarks.resume [--kills 200] [--minutes 30] [--write]

One `python -m workload train` runs to its end; its twins are killed while they start, train, save and evaluate, and
started again with the same command, until one ends by itself. Every twin that ended must have the rows of metrics.jsonl
(less what depends on the clock) and the last checkpoint's weights, moments and generators of the first, bit for bit.
The model is the demo narrowed to 1.6 million weights: a checkpoint of 19 MB is long enough to be met.
"""

import argparse
import math
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.results import PATH, write_part
from workload.metrics import TIMING, load_rows

TITLE = "# Training that is killed"
PHASES = ("starting", "training", "saving", "evaluating")
EVAL_EVERY, SAVE_EVERY = 20, 8
SETTINGS = [
    *[
        "n_layer=1",
        "n_head=2",
        "n_embd=32",
        "n_ctx=32",
        "batch=4",
        "micro_batch=2",
        "dropout=0.1",
        "max_seconds=0",
    ],
    *f"log_every=1 eval_every={EVAL_EVERY} save_every={SAVE_EVERY}".split(),
    *["eval_sequences=48", "sample_tokens=40", "keep=2", "lr=1e-3", "warmup=10"],
]
DEADLINE_S = 600  # of one start, after which something hangs


@dataclass
class Tally:
    """What happened so far."""

    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    finished: int = 0
    lost_steps: list[int] = field(
        default_factory=list
    )  # of each kill after the start: rows that had to be made again


def command(out: Path, steps: int) -> list[str]:
    options = ["--preset", "demo", "--device", "cpu", "--dtype", "fp32", "--threads", "1", "--out", str(out)]
    return [sys.executable, "-m", "workload", "train", *options, "--set", *SETTINGS, f"steps={steps}"]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def find_phase(out: Path, starts_before: int) -> str:
    """What the process that was just killed was doing, from the files that it left."""
    if count_lines(out / "starts.jsonl") == starts_before:
        return "starting"
    if any((out / "checkpoints").glob(".*.partial")):
        return "saving"
    rows = list(load_rows(out / "metrics.jsonl"))
    last = max((row["step"] for row in rows), default=0)
    kinds = {row["kind"] for row in rows if row["step"] == last}
    return "evaluating" if last % EVAL_EVERY == 0 and "sample" not in kinds else "training"


def wait_for_moment(child: subprocess.Popen[bytes], out: Path, wanted: str, starts_before: int) -> None:
    """Return at a random moment of the `wanted` phase, or when the child has ended."""
    began_s = time.monotonic()

    def until(condition: Callable[[], bool]) -> None:
        while child.poll() is None and not condition():
            time.sleep(0.0005)
            if time.monotonic() - began_s > DEADLINE_S:
                child.kill()
                raise SystemExit(f"{out}: no {wanted} within {DEADLINE_S} s")

    if wanted == "starting":
        end_s = began_s + random.uniform(0.1, 6.0)
        until(lambda: time.monotonic() > end_s or count_lines(out / "starts.jsonl") > starts_before)
        return
    until(lambda: count_lines(out / "starts.jsonl") > starts_before)
    end_s = time.monotonic() + random.uniform(0.0, 2.0)
    until(lambda: time.monotonic() > end_s)
    if wanted == "saving":
        folder = out / "checkpoints"
        until(lambda: any(folder.glob(".step-*.partial")))
        end_s = time.monotonic() + random.uniform(0.0, 0.15)
        until(lambda: time.monotonic() > end_s or not any(folder.glob(".*.partial")))
    elif wanted == "evaluating":
        until(lambda: find_phase(out, starts_before) == "evaluating")
        end_s = time.monotonic() + random.uniform(0.0, 0.1)
        until(lambda: time.monotonic() > end_s)


def start_and_kill(out: Path, steps: int, tally: Tally) -> bool:
    """One start of the run in `out`, killed in a phase drawn by lot; whether it ended by itself instead."""
    starts_before = count_lines(out / "starts.jsonl")
    with (out.parent / f"{out.name}.log").open("ab") as log:
        child = subprocess.Popen(command(out, steps), stdout=log, stderr=log)
    tally.starts += 1
    wait_for_moment(child, out, random.choice(PHASES), starts_before)
    child.send_signal(signal.SIGKILL)
    status = child.wait()
    if status == -signal.SIGKILL:
        tally.kills[find_phase(out, starts_before)] += 1
        steps_done = [row["step"] for row in load_rows(out / "metrics.jsonl") if row["kind"] == "step"]
        complete = sorted((out / "checkpoints").glob("step-*/manifest.json"))
        saved = int(complete[-1].parent.name.removeprefix("step-")) if complete else 0
        tally.lost_steps.append(max(0, max(steps_done, default=0) - saved))
        return False
    if status != 0:
        raise SystemExit(f"{out}: a resumed run ended with {status}; its log: {out}.log")
    return True


def finish(out: Path, steps: int) -> None:
    with (out.parent / f"{out.name}.log").open("ab") as log:
        status = subprocess.run(command(out, steps), stdout=log, stderr=log, check=False).returncode
    if status != 0:
        raise SystemExit(f"{out}: ended with {status}; its log: {out}.log")


def outcome(out: Path) -> dict[str, Any]:
    """All that an interruption may not change."""
    rows = [{k: v for k, v in row.items() if k not in TIMING} for row in load_rows(out / "metrics.jsonl")]
    folder = out / "checkpoints"
    names = [path.name for path in sorted(folder.glob("step-*"))]
    last = folder / names[-1]
    return {
        "rows": rows,
        "checkpoints": names,
        "pointers": [(folder / name).read_text() for name in ("latest", "best")],
        **{name: (last / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer", "random")},
    }


def run(root: Path, kills: int, steps: int, limit_s: float) -> Tally:
    """Raises SystemExit at the first difference or the first run that does not resume."""
    tally, end_s = Tally(), time.monotonic() + limit_s

    def enough() -> bool:
        return tally.kills.total() >= kills or time.monotonic() > end_s

    whole = root / "whole"
    finish(whole, steps)
    expected = outcome(whole)
    twin = 0
    while not enough():
        twin += 1
        out = root / f"twin-{twin}"
        ended = False
        while not ended and not enough():
            ended = start_and_kill(out, steps, tally)
            print(
                f"\r{tally.kills.total()} of {kills} kills, {tally.finished} runs ended", end="", flush=True
            )
        if not ended:
            finish(out, steps)
            tally.starts += 1
        seen = outcome(out)
        for name, value in expected.items():
            if seen[name] != value:
                raise SystemExit(f"\n{out}: {name} differ from those of {whole}")
        tally.finished += 1
        shutil.rmtree(out)
    print()
    return tally


def render(tally: Tally, steps: int, took_s: float) -> str:
    lost = tally.lost_steps
    lines = [
        TITLE,
        "",
        f"`python -m tests.benchmarks.resume --kills {tally.kills.total()} --steps {steps}`: {tally.kills.total()} times "
        f"`kill -9`, {tally.starts} starts, runs that came to their end: {tally.finished}; "
        f"{took_s / 60:.0f} minutes. Every start resumed. Every run that ended had the loss rows, the last weights, "
        "moments and generators of the run that was never interrupted, bit for bit.",
        "",
        "| killed while | times |",
        "|---|---|",
        *(f"| {phase} | {tally.kills[phase]} |" for phase in PHASES),
        "",
        f"Updates that had to be made again: {sum(lost) / max(1, len(lost)):.1f} a kill, {max(lost, default=0)} at most, "
        f"with a checkpoint every {SAVE_EVERY} updates.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=240, help="updates of a run")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which nothing more is killed")
    parser.add_argument("--root", type=Path, help="where the runs go (default: a folder that is removed)")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PATH.name}")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="resume-") as scratch:
        tally = run(arguments.root or Path(scratch), arguments.kills, arguments.steps, 60 * arguments.minutes)
    text = render(tally, arguments.steps, time.monotonic() - began_s)
    print(text)
    if arguments.write:
        write_part(text)


if __name__ == "__main__":
    main()
