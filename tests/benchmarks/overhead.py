"""What `fab provision` costs next to the same commands in one script, typed by a person who knew them all.

    python -m tests.benchmarks.overhead [--rounds 2]

On the rehearsed live system, each time from the same saved state with a blank disk, in turns. Ours: from the start of
`fab` (Python, connection, facts, probes) over every Step of the live stage to the end of the second probe. By hand: the
scripts of the same Steps, without any probe, in one `ssh root@… bash`, from its start to its end. After a run by hand
our probes look at the machine, and must find nothing to do: both did the same.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from provision.apply import gather_facts, plan_for
from provision.host import Host, connect
from provision.machine import load_machine
from provision.pins import fingerprint_of, parse_key
from provision.rehearsal.bed import DEFAULT_CACHE, NAME, Bed
from provision.rehearsal.loop import Rehearsal, fab_command, lines_of, start
from provision.rehearsal.vm import Vm
from provision.steps import Plan, prelude
from provision.system.layout import MOUNT
from tests.benchmarks.results import PATH, write_part

TITLE = "# A whole installation, next to the same commands by hand"
GOAL = 1.15
DEADLINE_S = 1800
SETTLE_S = 5  # a restored machine catches up with its clock


def by_hand(plan: Plan) -> str:
    """The plan's commands as a person would write them down: no probes, no markers, what follows a file once at its end."""
    last = {planned.step.then: index for index, planned in enumerate(plan.pending) if planned.step.then}
    lines = ["set -euo pipefail", prelude(MOUNT)]
    for index, planned in enumerate(plan.pending):
        lines.append(f"(\n{planned.step.script}\n)")
        if planned.step.then and last[planned.step.then] == index:
            lines.append(f"(\n{planned.step.then}\n)")
    return "\n".join(lines) + "\n"


class Bench:
    """One machine, started anew for every run."""

    def __init__(self, bed: Bed, vm: Vm) -> None:
        self.bed, self.vm = bed, vm
        self.rehearsal = Rehearsal(bed, vm, Console(width=160, quiet=True))
        self.fingerprint = fingerprint_of(parse_key(bed.parts.keys.host_line))

    def fresh(self) -> None:
        self.vm.kill()
        self.rehearsal.boot(cold=False)
        self.rehearsal.logs.mkdir(exist_ok=True)
        time.sleep(SETTLE_S)

    def host(self) -> Host:
        machine = load_machine(NAME, self.rehearsal.machines)
        return connect(machine, self.rehearsal.machines / "known_hosts", fingerprint=self.fingerprint)

    def plan(self) -> Plan:
        machine = load_machine(NAME, self.rehearsal.machines)
        with self.host() as host:
            return plan_for(machine, gather_facts(host), host)

    def ours(self) -> tuple[float, float]:
        """Seconds of all, and of that the Steps alone: from the first one's begin to the last one's end."""
        self.fresh()
        began = time.monotonic()
        process = start(
            fab_command("provision", "--fingerprint", self.fingerprint), self.rehearsal.environment
        )
        steps = 0.0
        try:
            for line in lines_of(process, DEADLINE_S, self.vm.check):
                word, _, rest = line.strip().partition(" ")
                if word == "done":
                    steps += float(rest.split()[0])
                if line.startswith("Probed again"):
                    return time.monotonic() - began, steps
            raise SystemExit(f"fab ended with {process.returncode} before its second probe")
        finally:
            process.kill()
            process.wait()

    def hand(self, script: str) -> float:
        self.fresh()
        log = self.rehearsal.logs / "by-hand.log"
        with log.open("wb") as output:
            began = time.monotonic()
            done = subprocess.run(
                [*self.bed.ssh_command(self.vm.ssh_port), "bash"],
                input=script.encode(),
                stdout=output,
                stderr=output,
                timeout=DEADLINE_S,
                check=False,
            )
            seconds = time.monotonic() - began
        if done.returncode:
            raise SystemExit(f"the script by hand ended with {done.returncode}; see {log}")
        # The clock is as late as the script is old: a person would have typed today's time.
        if left := [one.step.name for one in self.plan().pending if one.step.name != "clock"]:
            raise SystemExit(f"the script by hand left undone: {', '.join(left)}")
        return seconds


def render(
    ours: list[tuple[float, float]], hand: list[float], steps: int, loads: list[str], command: str
) -> str:
    ratios = [whole / theirs for (whole, _), theirs in zip(ours, hand, strict=True)]
    middle = statistics.median(ratios)
    lines = [
        TITLE,
        "",
        f"Written by `{command}`; not by hand.",
        "",
        f"The live stage of the rehearsed machine ({steps} Steps), each run from the same saved state with a blank disk, in turns;",
        "emulated. Ours is all of `fab provision` up to its second probe: Python's start, connection, facts, probes, Steps, probes.",
        "By hand is one bash script of the same commands without probes over one `ssh`; after it, our probes found nothing to do.",
        "",
        "| round | ours, s | of that the Steps, s | by hand, s | ratio |",
        "|---|---|---|---|---|",
    ]
    for index, ((whole, inner), theirs) in enumerate(zip(ours, hand, strict=True), 1):
        lines.append(f"| {index} | {whole:.1f} | {inner:.1f} | {theirs:.1f} | {whole / theirs:.3f} |")
    lines += [
        "",
        f"- at most {GOAL} times as long: {'met' if middle <= GOAL else 'MISSED'}, {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        "",
        f"State of the machine: {os.cpu_count()} processors, load (1 minute) before and after each round {', '.join(loads)}; "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}.",
    ]
    return "\n".join(lines) + "\n"


def load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="where the rehearsal's parts are kept"
    )
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    command = f"python -m tests.benchmarks.overhead --rounds {options.rounds}"
    ours: list[tuple[float, float]] = []
    hand: list[float] = []
    with Bed(options.cache, on_build=lambda name: print(f"building {name}", flush=True)) as bed:
        bench = Bench(bed, bed.machine("overhead"))
        bench.fresh()
        plan = bench.plan()
        script = by_hand(plan)
        loads = [load()]
        for turn in range(options.rounds):
            for who in ("ours", "hand") if turn % 2 == 0 else ("hand", "ours"):
                if who == "ours":
                    ours.append(bench.ours())
                else:
                    hand.append(bench.hand(script))
                print(
                    f"round {turn + 1}, {who}: {ours[-1][0] if who == 'ours' else hand[-1]:.1f} s", flush=True
                )
            loads.append(load())
            write_part(render(ours, hand, len(plan.pending), loads, command), options.out)
        bench.vm.kill()
    print(render(ours, hand, len(plan.pending), loads, command))
    return int(
        statistics.median(whole / theirs for (whole, _), theirs in zip(ours, hand, strict=True)) > GOAL
    )


if __name__ == "__main__":
    sys.exit(main())
