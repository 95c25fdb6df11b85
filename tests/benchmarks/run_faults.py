"""Fifty faults over the life of one run on a host: what each costs, and whether the run comes to the same end.

    python -m tests.benchmarks.run_faults [--faults 50] [--seed 1] [--write]

`fab train` as the library has it, with the real trainer, on a private sshd (tests/sshd.py). At steps spread over the
run one of these happens: `kill -9` of the trainer; of the whole unit with its wrapper; the machine restarts, with
everything on it killed; the connection that the run is followed over is cut. A twin that nothing happens to is trained
first. The rows of both (less what depends on the clock) must be the same, and who followed must have seen every line of
the log once. Stand-in: tests/standin/systemctl for systemd, which starts again at once and not after ten seconds.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from provision import jobs, runs
from provision.host import Host, connect
from tests.benchmarks.results import PATH, write_part
from tests.sshd import Proxy, Sshd
from tests.transport.trainer import installed
from workload.metrics import TIMING

TITLE = "# A run on a host, and what happens to it"
KINDS = ("trainer", "unit", "machine", "connection")
WORDS = {
    "trainer": "kill -9 of the trainer",
    "unit": "kill -9 of the unit",
    "machine": "restart of the machine",
    "connection": "connection cut",
}
SAVE_EVERY = 20  # steps
STEPS_A_FAULT = 26  # so that checkpoints come between faults: five starts without one end a run
SETTINGS = [
    *("model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.n_ctx=32", "model.dropout=0.1"),
    *("data.tokenizer=bytes", "train.batch=4", "train.micro_batch=2", "train.warmup=10", "train.lr=1e-3"),
    *(
        f"train.save_every={SAVE_EVERY}",
        "train.eval_every=200",
        "train.eval_sequences=8",
        "train.log_every=10",
    ),
    *("train.sample_tokens=0", "train.max_seconds=0", "train.keep=2"),
]
RUNS = "/run/home/ml/metal/runs"
DEADLINE_S = 300  # from a fault to the next step


@dataclass(frozen=True)
class Fault:
    kind: str
    step: int  # the last one that was done
    lost_steps: int  # that had to be made again; 0 where the trainer was not touched
    away_s: float  # until the next step was done


class Bench:
    """A machine, its run, and who follows it."""

    def __init__(self, sshd: Sshd, proxy: Proxy, host: Host) -> None:
        self.sshd, self.proxy, self.host = sshd, proxy, host
        self.lines: list[str] = []
        self.problem = ""

    def begin(self, name: str, steps: int, *, detach: bool) -> str:
        return jobs.train(
            self.host,
            self.host.wanted.machine,
            preset="demo",
            name=name,
            settings=[*SETTINGS, f"train.steps={steps}"],
            detach=detach,
            on_line=lambda line: None,
            say=lambda line: None,
        )

    def follow(self, run: str) -> threading.Thread:
        """From the first line to the end, over the proxy, in the background."""

        def at_work() -> None:
            try:
                with connect(self.sshd.machine(port=self.proxy.port), self.sshd.pins) as host:
                    log = self.host_folder(run) / "log"
                    unit = runs.unit_of(run)
                    host.follow(log, unit, on_line=self.lines.append, deadline_s=None, as_root=False)
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"

        thread = threading.Thread(target=at_work, daemon=True)
        thread.start()
        return thread

    def host_folder(self, run: str) -> PurePosixPath:
        return runs.Folder(PurePosixPath("/run/home/ml/metal")).run(run)

    def read(self, run: str, name: str) -> str:
        path = self.sshd.path(f"{RUNS}/{run}/{name}")
        return path.read_text() if path.exists() else ""

    def rows(self, run: str) -> list[dict[str, Any]]:
        text = self.read(run, "metrics.jsonl")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def step(self, run: str) -> int:
        """The last one in the file; rows after the checkpoint that a start goes on from are cut off by it."""
        return next((row["step"] for row in reversed(self.rows(run)) if row["kind"] == "step"), 0)

    def starts(self, run: str) -> list[int]:
        return [json.loads(line)["from_step"] for line in self.read(run, "starts.jsonl").splitlines()]

    def wait(self, what: str, done: Any) -> None:
        until = time.monotonic() + DEADLINE_S
        while not done():
            if time.monotonic() > until:
                raise SystemExit(f"waited {DEADLINE_S} s for {what}; {self.problem}")
            time.sleep(0.005)

    def make(self, run: str, kind: str) -> Fault:
        """The fault, and what it cost."""
        starts, began = len(self.starts(run)), time.monotonic()
        match kind:
            case "connection":
                self.proxy.cut()
            case "trainer":
                self.sshd.inside("pkill", "-KILL", "-f", f"workload train .*{run}")
            case "unit":
                self.sshd.inside("/run/bin/systemctl", "kill", "--signal=KILL", f"metal-run-{run}")
            case "machine":
                self.sshd.drop_connections()
                self.sshd.inside("/run/bin/systemctl", "boot")
        step, lost = self.step(run), 0
        if kind != "connection":
            self.wait("the next start", lambda: len(self.starts(run)) > starts)
            lost = step - self.starts(run)[-1]
        self.wait("the next step", lambda: self.step(run) > step - lost or self.read(run, "status"))
        return Fault(kind, step, lost, time.monotonic() - began)


def without_clock(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key not in TIMING} for row in rows]


def measure(bench: Bench, faults: int, seed: int) -> tuple[list[Fault], list[str], int]:
    """The faults, what is wrong in the end, and the steps of the run."""
    chance = random.Random(seed)
    steps = (faults + 1) * STEPS_A_FAULT
    kinds = [KINDS[i % len(KINDS)] for i in range(faults)]
    chance.shuffle(kinds)
    places = [int((i + 0.5 + chance.random()) * STEPS_A_FAULT) for i in range(faults)]
    twin = bench.begin("twin", steps, detach=False)
    run = bench.begin("run", steps, detach=True)
    follower = bench.follow(run)
    made = []
    for place, kind in zip(places, kinds, strict=True):
        bench.wait(f"step {place}", lambda: bench.step(run) >= place)  # noqa: B023
        made.append(bench.make(run, kind))
        now = made[-1]
        print(
            f"step {now.step:5}  {WORDS[kind]:24} {now.lost_steps:3} steps again, {now.away_s:5.1f} s",
            flush=True,
        )
    bench.wait("the end", lambda: bench.read(run, "status"))
    follower.join(60)
    wrong = [bench.problem] if bench.problem else []
    if without_clock(bench.rows(run)) != without_clock(bench.rows(twin)):
        wrong.append("its rows are not those of its twin")
    if bench.lines != bench.read(run, "log").splitlines():
        wrong.append("who followed has not seen the log as it is")
    if bench.read(run, "status").strip() != "0":
        wrong.append(f"it ended with status {bench.read(run, 'status').strip()}")
    return made, wrong, steps


def render(made: Sequence[Fault], wrong: Sequence[str], steps: int) -> str:
    lines = [
        TITLE,
        "",
        f"One run of {steps} steps, a checkpoint every {SAVE_EVERY}, {len(made)} faults; beside a twin that nothing happens to.",
        "Command: `python -m tests.benchmarks.run_faults --write`. Real trainer and sshd; systemd is a stand-in.",
        "",
        "| fault | times | most steps made again | on average |",
        "|---|---|---|---|",
    ]
    for kind in KINDS:
        lost = [fault.lost_steps for fault in made if fault.kind == kind]
        if lost:
            lines.append(f"| {WORDS[kind]} | {len(lost)} | {max(lost)} | {sum(lost) / len(lost):.1f} |")
    same = "Rows, end and followed log are those of the twin." if not wrong else f"Wrong: {'; '.join(wrong)}."
    most = max((fault.lost_steps for fault in made), default=0)
    return "\n".join(
        [*lines, "", f"{same} At most {most} steps were made again, of {SAVE_EVERY} between checkpoints.", ""]
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.run_faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"into {PATH.name}")
    arguments = parser.parse_args(argv)
    if os.geteuid() != 0:
        parser.error("needs root: the private sshd lives in namespaces of its own")
    runs.RESTART_S = 0
    with tempfile.TemporaryDirectory() as name:
        sshd = Sshd(Path(name))
        proxy = Proxy(sshd.port)
        try:
            with installed(sshd) as host:
                made, wrong, steps = measure(Bench(sshd, proxy, host), arguments.faults, arguments.seed)
        finally:
            proxy.close()
            sshd.close()
    text = render(made, wrong, steps)
    print(text)
    if arguments.write:
        write_part(text)
    too_many = any(fault.lost_steps > SAVE_EVERY for fault in made)
    return int(bool(wrong) or too_many)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
