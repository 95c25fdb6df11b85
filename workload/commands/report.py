"""python -m workload report."""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from workload.commands.common import add_command
from workload.errors import WorkloadError

if TYPE_CHECKING:
    from workload.commands.common import Commands

EPILOG = """\
one run        its report.html, written again from its files
several runs   compare.html: their curves over each other by step, tokens or time, and the settings in which they differ
"""


def add(commands: "Commands") -> None:
    command = add_command(commands, "report", run, "write a run's report.html again, or compare runs", EPILOG)
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    command.add_argument(
        "--out", type=Path, help="the page (default: RUN/report.html; compare.html for several runs)"
    )
    command.add_argument("--open", action="store_true", help="show it in a browser")
    command.add_argument(
        "--tensorboard",
        type=Path,
        metavar="DIR",
        help="write TensorBoard's event files to DIR/RUN instead of a page (needs: pip install tensorboard)",
    )


def run(arguments: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from workload.compare import name_apart, save_comparison
    from workload.report import load_record, save_report

    for path in arguments.runs:
        if not (path / "metrics.jsonl").exists():
            raise WorkloadError(f"{path}: no metrics.jsonl, so not a run", "name a folder below runs/")
    if arguments.tensorboard is not None:
        from workload.tensorboard import save_events

        if arguments.out is not None or arguments.open:
            raise WorkloadError(
                "--tensorboard writes no page", "leave out --out and --open, or --tensorboard"
            )
        for record in name_apart([load_record(path) for path in arguments.runs], arguments.runs):
            print(save_events(record, arguments.tensorboard))
        print(f"tensorboard --logdir {arguments.tensorboard}")
        return 0
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        raise WorkloadError(f"{arguments.out}: there is no folder {arguments.out.parent}")
    if len(arguments.runs) == 1:
        page = save_report(arguments.runs[0])
        if arguments.out is not None and arguments.out.resolve() != page.resolve():
            shutil.copyfile(page, arguments.out)
            page = arguments.out
    else:
        page = save_comparison(arguments.runs, arguments.out or Path("compare.html"), datetime.now(UTC))
    print(page)
    if arguments.open:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            raise WorkloadError(f"no browser was found to show {page}")
    return 0
