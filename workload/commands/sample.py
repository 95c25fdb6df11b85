"""python -m workload sample."""

import argparse
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from workload.commands.common import add_command, add_device, add_run, load_model, prepare_device
from workload.errors import WorkloadError

if TYPE_CHECKING:
    from workload.commands.common import Commands


def add(commands: "Commands") -> None:
    command = add_command(commands, "sample", run, "let a model go on from a prompt")
    add_run(command)
    command.add_argument(
        "--prompt", help="text to go on from, - for that of stdin (default: the run's sample_prompt)"
    )
    command.add_argument("--tokens", type=int, default=400, help="how many (default 400)")
    command.add_argument("--count", type=int, default=1, help="samples, drawn at once (default 1)")
    command.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest always (default 0.8)"
    )
    command.add_argument(
        "--top-k", type=int, default=200, help="draw from so many likeliest; 0: all (default 200)"
    )
    command.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the likeliest that have this probability together; 1: all (default 1)",
    )
    command.add_argument(
        "--seed", type=int, default=1, help="of the first sample; the next has the next (default 1)"
    )
    add_device(command)


def run(arguments: argparse.Namespace) -> int:
    from workload.generate import generate_several, stream_text
    from workload.tokenizer import load_tokenizer

    check(arguments)
    device, dtype, _ = prepare_device(arguments)
    saved, model = load_model(arguments.run, arguments.checkpoint, device)
    tokenizer = load_tokenizer(saved.config.data.tokenizer)
    prompt = saved.config.train.sample_prompt if arguments.prompt is None else arguments.prompt
    if prompt == "-":
        prompt = sys.stdin.read()
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    if (n_ctx := model.config.n_ctx) < len(ids):
        print(
            f"note     the prompt has {len(ids)} tokens, the context {n_ctx}: only its end is read",
            file=sys.stderr,
        )
    rows = generate_several(
        model,
        ids,
        arguments.tokens,
        samples=arguments.count,
        n_vocab=tokenizer.eot + 1,
        seed=arguments.seed,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        dtype=dtype,
    )
    if arguments.count == 1:
        print(prompt, end="", flush=True)
        for text in stream_text(tokenizer, (row[0] for row in rows)):
            print(text, end="", flush=True)
        print()
        return 0
    for i, tokens in enumerate(zip(*rows, strict=True)):
        print(f"--- {i + 1} of {arguments.count}, seed {arguments.seed + i}")
        print(prompt + "".join(stream_text(tokenizer, tokens)))
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises one WorkloadError that names every option out of range."""
    rules: list[tuple[str, str, Callable[[float], bool]]] = [
        ("tokens", "1 or more", lambda value: value >= 1),
        ("count", "1 or more", lambda value: value >= 1),
        ("temperature", "0 or more", lambda value: 0 <= value < math.inf),
        ("top_k", "0 or more", lambda value: value >= 0),
        ("top_p", "more than 0 and at most 1", lambda value: 0 < value <= 1),
        ("seed", "0 or more", lambda value: value >= 0),
    ]
    errors = [
        f"--{name.replace('_', '-')} must be {expected}, not {getattr(arguments, name)}"
        for name, expected, holds in rules
        if not holds(getattr(arguments, name))
    ]
    if errors:
        raise WorkloadError("\n".join(errors), "python -m workload sample --help")
