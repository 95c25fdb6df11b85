"""python -m workload explain."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from workload.commands.common import add_command, load_model, prepare_device

if TYPE_CHECKING:
    from workload.commands.common import Commands


def add(commands: "Commands") -> None:
    command = add_command(
        commands, "explain", run, "walk one text through a model, step by step, with a picture"
    )
    command.add_argument("text", help="a few words, at most the model's context")
    command.add_argument(
        "--checkpoint", type=Path, help="folder of a run or of a checkpoint (default: a small fresh model)"
    )
    command.add_argument(
        "--out", type=Path, default=Path("explain.html"), help="the picture (default explain.html)"
    )
    command.add_argument("--threads", type=int, default=0, help="default: the cores there are")
    command.set_defaults(device="cpu", dtype="fp32")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from workload.config import load_config
    from workload.explain import encode_prompt, render_page, render_text, save_page, trace
    from workload.model import GPT2
    from workload.tokenizer import load_tokenizer

    prepare_device(arguments)
    if arguments.checkpoint is None:
        config = load_config("demo")
        torch.manual_seed(config.train.seed)
        model = GPT2(config.model).eval()
        about = "fresh, as the demo preset begins: it has learned nothing, so its guesses are chance"
    else:
        saved, model = load_model(arguments.checkpoint, "best", torch.device("cpu"))
        config, about = saved.config, f"{arguments.checkpoint}, step {saved.state.step}"
    tokenizer = load_tokenizer(config.data.tokenizer)
    ids = encode_prompt(arguments.text, tokenizer, config.model.n_ctx)
    walk = trace(model, ids, tokenizer.eot + 1)
    save_page(render_page(walk, model, tokenizer, about, arguments.text), arguments.out)
    print(render_text(walk, model, tokenizer, about))
    print(f"\npicture  {arguments.out}")
    return 0
