"""python -m workload: reads the command line and turns an error into one message."""

import argparse
import os
import sys

from workload.commands import bench, evaluate, explain, export, import_, prepare, report, sample, train
from workload.errors import WorkloadError
from workload.files import FULL

# Read by OpenMP when torch is loaded. Threads that spin while they wait for each other take the cores from those
# that they wait for when anything else runs: measured, 3.1 s a step instead of 0.07 s on two busy cores. A token is made
# of hundreds of products of a matrix and a vector, each shorter than waking a thread: there they spin, but briefly
# (on two idle cores 512 tokens at 124M took 9.9 s; with 10000 turns of spinning 11.8 s: medians of six, in turns).
WAITS = {"OMP_WAIT_POLICY": "PASSIVE"}
BRIEF_WAITS = {**WAITS, "GOMP_SPINCOUNT": "100000"}
COMMANDS = (train, prepare, sample, evaluate, export, import_, explain, report, bench)


def main(argv: list[str]) -> int:
    """Run one command; 0, or 1 after one readable error."""
    arguments = make_parser().parse_args(argv, argparse.Namespace(argv=argv))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.update(BRIEF_WAITS if arguments.command is sample.run else WAITS)
    try:
        return int(arguments.command(arguments))
    except WorkloadError as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing is left to say
    except OSError as error:
        if error.errno not in FULL:
            raise
        full = WorkloadError(f"the disk is full: {error}", "make room, then give the same command again")
        print(f"error: {full}", file=sys.stderr)
    return 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workload",
        description="Train GPT-2 from scratch, and use what came of it. No network is needed.",
        epilog="Begin with: python -m workload train    (minutes, on any CPU)",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
