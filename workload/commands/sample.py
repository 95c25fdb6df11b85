"""python -m workload sample."""

import argparse
from typing import TYPE_CHECKING

from workload.commands.common import add_command, add_device, add_run, load_model, prepare_device

if TYPE_CHECKING:
    from workload.commands.common import Commands


def add(commands: "Commands") -> None:
    command = add_command(commands, "sample", run, "let a model go on from a prompt")
    add_run(command)
    command.add_argument("--prompt", help="text to go on from (default: the run's sample_prompt)")
    command.add_argument("--tokens", type=int, default=400, help="how many (default 400)")
    command.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest always (default 0.8)"
    )
    command.add_argument(
        "--top-k", type=int, default=200, help="draw from so many likeliest; 0: all (default 200)"
    )
    command.add_argument("--seed", type=int, default=1)
    add_device(command)


def run(arguments: argparse.Namespace) -> int:
    from workload.generate import generate, stream_text
    from workload.tokenizer import load_tokenizer

    device, dtype, _ = prepare_device(arguments)
    saved, model = load_model(arguments.run, arguments.checkpoint, device)
    tokenizer = load_tokenizer(saved.config.data.tokenizer)
    prompt = saved.config.train.sample_prompt if arguments.prompt is None else arguments.prompt
    tokens = generate(
        model,
        tokenizer.encode(prompt) or [tokenizer.eot],
        arguments.tokens,
        n_vocab=tokenizer.eot + 1,
        seed=arguments.seed,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        dtype=dtype,
    )
    print(prompt, end="", flush=True)
    for text in stream_text(tokenizer, tokens):
        print(text, end="", flush=True)
    print()
    return 0
