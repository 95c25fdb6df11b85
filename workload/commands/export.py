"""python -m workload export."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from workload.commands.common import add_command, add_run, find_checkpoint

if TYPE_CHECKING:
    from workload.commands.common import Commands


def add(commands: "Commands") -> None:
    command = add_command(commands, "export", run, "write a model as a file that other programs read")
    add_run(command)
    command.add_argument(
        "--to",
        required=True,
        choices=("hf", "nanogpt", "book"),
        help="hf: a folder for GPT2LMHeadModel; nanogpt: a ckpt.pt; book: safetensors for the book's GPTModel",
    )
    command.add_argument("--out", type=Path, required=True, help="folder (hf) or file to make")


def run(arguments: argparse.Namespace) -> int:
    from workload import checkpoint
    from workload.convert import export_model

    saved = checkpoint.load(find_checkpoint(arguments.run, arguments.checkpoint), only_model=True)
    notes = export_model(saved, arguments.to, arguments.out)
    print(f"step {saved.state.step} of {arguments.run} as {arguments.to}: {arguments.out}")
    for note in notes:
        print(f"note     {note}")
    return 0
