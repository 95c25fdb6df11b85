"""What the commands share: options, the device, the model that a command works on, and how to stop.

Everything heavy is imported by the function that needs it, so that ``--help`` is instant.
"""

import argparse
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from workload.config import SECTIONS
from workload.errors import WorkloadError

if TYPE_CHECKING:
    import torch

    from workload.checkpoint import Checkpoint
    from workload.model import GPT2

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

RUNS = Path("runs")


def add_command(
    commands: "Commands",
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    epilog: str = "",
) -> argparse.ArgumentParser:
    """A subcommand that calls `run`; its options are the caller's to add."""
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=run)
    return command


def add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, help="folder of a run or of a checkpoint")
    command.add_argument("--checkpoint", default="best", help="of a run: best (default), latest, or a step")


def add_settings(command: argparse.ArgumentParser, help: str) -> None:
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=help)


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", default="auto", help="auto (a GPU when there is one), cpu, cuda or cuda:N"
    )
    command.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bf16", "fp16", "fp32"),
        help="auto: bf16 where the processor has it, fp16 on GPUs that have only that",
    )
    command.add_argument("--threads", type=int, default=0, help="on a CPU (default: the cores there are)")


def describe_keys() -> str:
    """Every key with its default and the comment that says its unit, as in config.py."""
    import inspect
    import re

    lines = [
        "keys of --set (section.key=value, or key=value) with the defaults of a preset that does not set them:"
    ]
    for section, kind in SECTIONS.items():
        for name, default, what in re.findall(
            r"^    (\w+): \w+ = (.+?)  # (.+)$", inspect.getsource(kind), re.M
        ):
            lines.append(f"  {section}.{name:<{20 - len(section)}} {default:<8} {what}")
    return "\n".join(lines)


def prepare_device(arguments: argparse.Namespace) -> "tuple[torch.device, torch.dtype, int]":
    """(device, dtype, cores), and torch set to them."""
    import torch

    from workload.device import choose_device, choose_dtype, count_cores, keep_memory, read_cpu_flags

    device = choose_device(arguments.device)
    if device.type == "cpu":
        keep_memory()
    threads = arguments.threads or count_cores()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32 on a GPU; no effect on a CPU
    return device, choose_dtype(arguments.dtype, device, read_cpu_flags()), threads


def find_checkpoint(path: Path, which: str) -> Path:
    from workload import checkpoint

    if not path.exists():
        raise WorkloadError(f"{path}: there is no such folder", "name a run below runs/, or a checkpoint")
    return checkpoint.find(path, which)


def load_model(path: Path, which: str, device: "torch.device") -> "tuple[Checkpoint, GPT2]":
    import torch

    from workload import checkpoint
    from workload.model import GPT2

    saved = checkpoint.load(find_checkpoint(path, which), only_model=True)
    with torch.device("meta"):
        model = GPT2(saved.config.model)
    model.load_state_dict(saved.model, assign=True)
    return saved, model.to(device).eval()


def stop_on_signals() -> Callable[[], bool]:
    """From here on SIGTERM and SIGINT ask the run to save and end; a second one ends it at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return lambda: asked
