"""python -m workload import."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from workload.commands.common import add_command, add_settings

if TYPE_CHECKING:
    from workload.commands.common import Commands


def add(commands: "Commands") -> None:
    command = add_command(
        commands, "import", run, "make a run of weights from elsewhere, to sample or to train on"
    )
    command.add_argument(
        "source",
        type=Path,
        help="a Hugging Face folder, a nanoGPT ckpt.pt, or a .safetensors, the book's too",
    )
    command.add_argument("--out", type=Path, required=True, help="folder of the run to make")
    command.add_argument(
        "--heads",
        type=int,
        default=0,
        help="attention heads, if the file does not say (default: of 64 channels)",
    )
    command.add_argument(
        "--tokenizer", choices=("gpt2", "bytes"), help="default: by the size of the vocabulary"
    )
    add_settings(
        command, "configuration of training that may follow, as in train: data.source=… lr=… steps=…"
    )


def run(arguments: argparse.Namespace) -> int:
    from workload.convert import import_model, render_imported

    imported = import_model(
        arguments.source,
        arguments.out,
        heads=arguments.heads,
        tokenizer=arguments.tokenizer or "",
        settings=arguments.set,
    )
    for line in render_imported(imported, arguments.source, arguments.out):
        print(line)
    return 0
