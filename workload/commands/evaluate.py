"""python -m workload eval."""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from workload.commands.common import add_command, add_device, add_run, load_model, prepare_device

if TYPE_CHECKING:
    from workload.commands.common import Commands


def add(commands: "Commands") -> None:
    command = add_command(commands, "eval", run, "validation loss and bits per byte of a model")
    add_run(command)
    command.add_argument("--data", help="a prepared folder or text (default: the run's)")
    command.add_argument("--sequences", type=int, default=0, help="how many, evenly spaced; 0: all (default)")
    add_device(command)


def run(arguments: argparse.Namespace) -> int:
    from workload.data import load_split
    from workload.evaluate import evaluate
    from workload.prepare import find_shards
    from workload.tokenizer import count_bytes, load_tokenizer

    device, dtype, threads = prepare_device(arguments)
    saved, model = load_model(arguments.run, arguments.checkpoint, device)
    data = saved.config.data
    # A run has the shards that it made; a checkpoint that came home alone has its text made into shards again.
    own = [
        path / "data"
        for path in (arguments.run, *arguments.run.resolve().parents[:2])
        if (path / "data").is_dir()
    ]
    source = arguments.data or (str(own[0]) if own else data.source)
    with tempfile.TemporaryDirectory(prefix="workload-") as scratch:
        shards = find_shards(
            source,
            Path(scratch) / "data",
            tokenizer=data.tokenizer,
            val_fraction=data.val_fraction,
            threads=threads,
        )
        score = evaluate(
            model,
            load_split(shards, "val"),
            count_bytes(load_tokenizer(data.tokenizer)),
            sequences=arguments.sequences,
            micro_batch=saved.config.train.micro_batch or 8,
            dtype=dtype,
        )
    assert score is not None
    print(
        f"step {saved.state.step}: validation loss {score.loss:.4f}, {score.bits_per_byte:.4f} bits/byte, "
        f"over {score.tokens:,} tokens of {source}"
    )
    return 0
