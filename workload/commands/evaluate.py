"""python -m workload eval."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from workload.commands.common import add_command, add_device, add_run, load_model, prepare_device
from workload.errors import WorkloadError

if TYPE_CHECKING:
    import torch

    from workload.checkpoint import Checkpoint
    from workload.commands.common import Commands
    from workload.evaluate import Score
    from workload.model import GPT2

EPILOG = """\
Without a task, the validation loss: nats a token and bits per byte of the run's validation split, or of --data.

--hellaswag  rowanz/hellaswag's hellaswag_val.jsonl. The ending of the lowest mean nats a token is the model's choice,
             as in llm.c and build-nanogpt (acc_norm; by the sum: acc). Chance is 25%; OpenAI's 124M has 29.55%.
--lambada    OpenAI's lambada_test.jsonl. Last word right, token by token; perplexity of a word, as lambada_openai of
             the lm-evaluation-harness.
--text       nats a token, perplexity of a token, bits per byte of any text. Windows of the model's context begin
             --stride tokens apart and the last --stride tokens of each are scored, so each token is scored once,
             after at least context - stride others. A smaller stride: lower perplexity, more work.
"""


def add(commands: "Commands") -> None:
    command = add_command(
        commands, "eval", run, "validation loss, HellaSwag, LAMBADA, perplexity of a text", EPILOG
    )
    add_run(command)
    command.add_argument("--data", help="validate on a prepared folder or text (default: the run's)")
    command.add_argument("--sequences", type=int, default=0, help="how many, evenly spaced; 0: all (default)")
    command.add_argument("--hellaswag", type=Path, metavar="FILE.jsonl", help="score HellaSwag")
    command.add_argument("--lambada", type=Path, metavar="FILE.jsonl", help="score LAMBADA")
    command.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N lines of these")
    command.add_argument("--text", metavar="FILE", help="score a text file; - reads it from stdin")
    command.add_argument(
        "--stride", type=int, default=0, metavar="TOKENS", help="of --text (default: half of the context)"
    )
    command.add_argument("--json", action="store_true", help="one object on stdout instead of lines")
    add_device(command)


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from workload import tasks
    from workload.tokenizer import load_tokenizer

    if arguments.limit < 0 or arguments.stride < 0 or arguments.sequences < 0:
        raise WorkloadError("--limit, --stride and --sequences are 0 or more")
    # Files first: what is wrong with them is said before a large model is loaded.
    choices = tasks.load_hellaswag(arguments.hellaswag, arguments.limit) if arguments.hellaswag else []
    texts = tasks.load_lambada(arguments.lambada, arguments.limit) if arguments.lambada else []
    text = read_text(arguments.text) if arguments.text else None
    device, dtype, threads = prepare_device(arguments)
    saved, model = load_model(arguments.run, arguments.checkpoint, device)
    tokenizer = load_tokenizer(saved.config.data.tokenizer)
    found: dict[str, object] = {"model": str(arguments.run), "step": saved.state.step}
    lines: list[str] = []
    step = saved.state.step

    if arguments.data or not (choices or texts or text is not None):
        score, source = validate(arguments, saved, model, dtype, threads)
        found["validation"] = {"data": source, **asdict(score)}
        lines.append(
            f"step {step}: validation loss {score.loss:.4f}, {score.bits_per_byte:.4f} bits/byte, "
            f"over {score.tokens:,} tokens of {source}"
        )
    if choices:
        swag = tasks.score_hellaswag(model, tokenizer, choices, dtype=dtype, progress=show("hellaswag"))
        found["hellaswag"] = asdict(swag)
        lines.append(
            f"step {step}: HellaSwag {swag.accuracy_norm:.2%} by nats a token, {swag.accuracy:.2%} by nats, "
            f"of {swag.examples:,}"
        )
    if texts:
        word = tasks.score_lambada(model, tokenizer, texts, dtype=dtype, progress=show("lambada"))
        found["lambada"] = asdict(word)
        lines.append(
            f"step {step}: LAMBADA {word.accuracy:.2%} of {word.examples:,}, perplexity {word.perplexity:,.2f} a word"
        )
    if text is not None:
        whole = tasks.score_text(
            model, tokenizer, text, dtype=dtype, stride=arguments.stride, progress=show("text")
        )
        found["text"] = {"source": arguments.text, **asdict(whole)}
        lines.append(
            f"step {step}: {whole.nats_per_token:.4f} nats a token, perplexity {whole.perplexity:,.2f}, "
            f"{whole.bits_per_byte:.4f} bits/byte, over {whole.tokens:,} tokens, stride {whole.stride}"
        )
    print(json.dumps(found, ensure_ascii=False, indent=1) if arguments.json else "\n".join(lines))
    return 0


def read_text(name: str) -> str:
    """The text of a file, of stdin for "-"."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise WorkloadError(f"{name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{name}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def show(
    what: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """Progress on stderr: one line that changes on a terminal, a line every 15 s elsewhere."""
    out = stream or sys.stderr
    every_s = 0.2 if out.isatty() else 15.0
    last = clock()

    def report(done: int, of: int) -> None:
        nonlocal last
        finished = done == of
        if clock() - last >= every_s:
            last = clock()
            line = f"{what}  {done:,}/{of:,}  {done / of:.0%}"
            print(
                f"\r{line}" if out.isatty() else line, end="" if out.isatty() else "\n", file=out, flush=True
            )
        if finished and out.isatty():
            print("\r\x1b[K", end="", file=out, flush=True)

    return report


def validate(
    arguments: argparse.Namespace, saved: "Checkpoint", model: "GPT2", dtype: "torch.dtype", threads: int
) -> "tuple[Score, str]":
    """The score on the validation split, and whose it is."""
    from workload.data import load_split
    from workload.evaluate import evaluate
    from workload.prepare import find_shards
    from workload.tasks import TOKENS_AT_ONCE
    from workload.tokenizer import count_bytes, load_tokenizer

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
            # 0: the run chose what fitted its own device
            micro_batch=saved.config.train.micro_batch or max(1, TOKENS_AT_ONCE // saved.config.model.n_ctx),
            dtype=dtype,
        )
    assert score is not None
    return score, source
