"""python -m workload prepare."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from workload.commands.common import add_command, stop_on_signals
from workload.errors import WorkloadError

if TYPE_CHECKING:
    from workload.commands.common import Commands
    from workload.prepare import Seen

EPILOG = """sources
  demo                   eight plays of Shakespeare, in the package
  FILE or FOLDER         .txt and .md are texts; rows of .jsonl and .parquet are documents
  FILE.safetensors       a tensor "tokens" of whole numbers, as it is
  hf:OWNER/NAME[:CONFIG][@REVISION]
                         the split "train" of a data set on the Hugging Face hub
  fineweb-10b            FineWeb's sample of 10e9 tokens; fineweb-edu-10b, fineweb-100b likewise

Documents (rows, or at least 200 text files) are split by a hash of their text, so copies stay on one side; of fewer
texts each gives its end to validation. What was interrupted, the same command goes on with. .jsonl, text and tokens
need nothing more; .parquet and the hub need: pip install 'metal-to-model[data]'"""


def add(commands: "Commands") -> None:
    command = add_command(commands, "prepare", run, "turn text into token shards", EPILOG)
    command.add_argument("source", help="what to read, see below; with --verify: a folder of tokens")
    command.add_argument("--out", type=Path, help="folder to make")
    command.add_argument("--tokenizer", choices=("gpt2", "bytes"), default="gpt2")
    command.add_argument(
        "--val-fraction",
        type=float,
        help="kept for validation (default 0.01 of documents on the hub, of others and of each text's end 0.1)",
    )
    command.add_argument(
        "--tokens", type=count, default=0, help="at most, to train on: 1e9, 500M (default all)"
    )
    command.add_argument("--text-column", default="text", help="of rows, where the text is (default text)")
    command.add_argument(
        "--skip-bad", action="store_true", help="leave out rows without text instead of ending"
    )
    command.add_argument("--workers", type=int, default=0, help="processes (default: the cores there are)")
    command.add_argument(
        "--verify", action="store_true", help="read a folder of tokens whole: checksums and vocabulary"
    )


def count(word: str) -> int:
    """A number of tokens: 1000, 1e9, 500M, 10B."""
    unit = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}.get(word[-1:].lower(), 1)
    try:
        number = float(word[:-1] if unit > 1 else word) * unit
    except ValueError:
        number = -1.0
    if not 0 < number < 1e15 or number != int(number):
        raise argparse.ArgumentTypeError(f"{word} is not a number of tokens; 1e9, 500M and 10B are")
    return int(number)


def run(arguments: argparse.Namespace) -> int:
    from workload.device import count_cores
    from workload.hub import is_named
    from workload.prepare import prepare

    if arguments.verify:
        return verify(Path(arguments.source), arguments.tokenizer)
    if arguments.out is None:
        raise WorkloadError("--out is missing: the folder to make", "for example: --out data/NAME")
    val_fraction = arguments.val_fraction
    if val_fraction is None:
        val_fraction = 0.01 if is_named(arguments.source) else 0.1
    should_stop = stop_on_signals()
    meta = prepare(
        arguments.source,
        arguments.out,
        tokenizer=arguments.tokenizer,
        val_fraction=val_fraction,
        threads=arguments.workers or count_cores(),
        tokens=arguments.tokens,
        column=arguments.text_column,
        skip_bad=arguments.skip_bad,
        note=lambda text: print(text, flush=True),
        watch=Meter(sys.stderr, time.monotonic),
        should_stop=should_stop,
    )
    for split in ("train", "val"):
        print(f"{split:5}  {meta[f'{split}_tokens']:,} tokens of {meta[f'{split}_bytes']:,} bytes")
    if meta["split_by"] == "document":
        left_out = f"; {meta['skipped']:,} rows without text left out" if meta["skipped"] else ""
        print(f"of     {meta['train_documents']:,} + {meta['val_documents']:,} documents{left_out}")
    print(
        f"use    python -m workload train --set data.source={arguments.out} data.tokenizer={arguments.tokenizer} …"
    )
    return 0


def verify(folder: Path, tokenizer: str) -> int:
    from workload.config import TOKENIZERS
    from workload.data import META, load_meta
    from workload.shards import load_shards, verify

    if not folder.is_dir():
        raise WorkloadError(f"{folder}: there is no such folder", "--verify reads one that prepare made")
    if (folder / META).exists():
        tokenizer = str(load_meta(folder).get("tokenizer", tokenizer))
    listed = load_shards(folder)
    for name, shard in verify(folder, TOKENIZERS[tokenizer]).items():
        known = "as it was made" if name in listed else "no checksum to compare with"
        print(
            f"{name}  {shard.tokens:,} tokens, none above {shard.largest}, sha256 {shard.sha256[:12]}…: {known}"
        )
    return 0


class Meter:
    """How far it is and how long it will take: a line that moves on a terminal, one every 15 s elsewhere."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream, self._clock = stream, clock
        self._begun = self._last = clock()
        self._is_terminal = stream.isatty()

    def __call__(self, seen: "Seen") -> None:
        from workload.progress import format_duration

        now = self._clock()
        if now - self._last < (0.2 if self._is_terminal else 15.0):
            return
        self._last = now
        done, elapsed = seen.fraction - seen.resumed, now - self._begun
        eta = format_duration(elapsed * (1 - seen.fraction) / done) if done > 0 else "?"
        line = f"{seen.fraction:6.1%}  {seen.tokens:,} tokens  {seen.new / elapsed:,.0f} tok/s  eta {eta}  {seen.waiting}"
        if self._is_terminal:  # what is printed next begins over it
            print(f"\r{line.rstrip()}\x1b[K\r", end="", file=self._stream, flush=True)
        else:
            print(line.rstrip(), file=self._stream, flush=True)
