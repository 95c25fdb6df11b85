"""python -m workload prepare."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from workload.commands.common import add_command

if TYPE_CHECKING:
    from workload.commands.common import Commands


def add(commands: "Commands") -> None:
    command = add_command(commands, "prepare", run, "turn text into token shards")
    command.add_argument("source", help='a text file, a folder with .txt and .md files, or "demo"')
    command.add_argument("--out", type=Path, required=True, help="folder to make")
    command.add_argument("--tokenizer", choices=("gpt2", "bytes"), default="gpt2")
    command.add_argument(
        "--val-fraction", type=float, default=0.1, help="of each text, its end (default 0.1)"
    )


def run(arguments: argparse.Namespace) -> int:
    from workload.device import count_cores
    from workload.prepare import prepare

    meta = prepare(
        arguments.source,
        arguments.out,
        tokenizer=arguments.tokenizer,
        val_fraction=arguments.val_fraction,
        threads=count_cores(),
    )
    for split in ("train", "val"):
        print(f"{split:5}  {meta[f'{split}_tokens']:,} tokens of {meta[f'{split}_bytes']:,} bytes")
    print(
        f"use    python -m workload train --set data.source={arguments.out} data.tokenizer={arguments.tokenizer} …"
    )
    return 0
