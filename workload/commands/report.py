"""python -m workload report."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from workload.commands.common import add_command
from workload.errors import WorkloadError

if TYPE_CHECKING:
    from workload.commands.common import Commands


def add(commands: "Commands") -> None:
    command = add_command(commands, "report", run, "write a run's report.html again")
    command.add_argument("run", type=Path, help="folder of a run")


def run(arguments: argparse.Namespace) -> int:
    from workload.report import save_report

    if not (arguments.run / "metrics.jsonl").exists():
        raise WorkloadError(f"{arguments.run}: no metrics.jsonl, so not a run", "name a folder below runs/")
    print(save_report(arguments.run))
    return 0
