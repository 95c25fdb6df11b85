"""python -m workload: the commands. Everything heavy is imported by the command that needs it."""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from workload.config import SECTIONS, list_presets
from workload.errors import WorkloadError

if TYPE_CHECKING:
    import torch

    from workload.checkpoint import Checkpoint
    from workload.model import GPT2

RUNS = Path("runs")


def main(argv: list[str]) -> int:
    """Run one command; 0, or 1 after one readable error."""
    arguments = make_parser().parse_args(argv)
    # Read by OpenMP when torch is loaded. Threads that spin while they wait for each other take the cores from those
    # that they wait for when anything else runs: measured, 3.1 s a step instead of 0.07 s on two busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return int(arguments.command(arguments))
    except WorkloadError as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing is left to say
    return 1


def run_train(arguments: argparse.Namespace) -> int:
    from workload.metrics import load_rows
    from workload.progress import format_duration, make_reporter
    from workload.report import save_report
    from workload.runs import find_newest, name_run, resolve_config
    from workload.train import train

    out: Path = arguments.out or (
        find_newest(RUNS) if arguments.resume else name_run(RUNS, arguments.preset or "demo", datetime.now())
    )
    if arguments.resume and not (out / "config.toml").exists():
        raise WorkloadError(f"{out}: there is no run to resume", "leave out --resume to begin one there")
    config = resolve_config(out, arguments.preset, arguments.set)
    should_stop = stop_on_signals()
    device, dtype, threads = prepare_device(arguments)
    with make_reporter(time.monotonic, config.train.log_every) as reporter:
        state = train(
            config,
            out,
            device=device,
            dtype=dtype,
            threads=threads,
            reporter=reporter,
            should_stop=should_stop,
        )
    report = save_report(out)
    if state.step < state.steps or should_stop():
        print(f"stopped at step {state.step} of {state.steps}, saved; go on with")
        print(f"    python -m workload train --resume --out {out}")
        return 0
    rows = list(load_rows(out / "metrics.jsonl"))
    sample = next((row for row in reversed(rows) if row["kind"] == "sample"), None)
    if sample is not None:
        print(f"\n{sample['prompt']}{sample['text']}\n")
    scores = [row for row in rows if row["kind"] == "eval"]
    print(
        f"trained {state.step} steps in {format_duration(state.elapsed_s)}: validation loss "
        f"{scores[0]['val_loss']:.4f} -> {scores[-1]['val_loss']:.4f}, "
        f"{scores[0]['val_bits_per_byte']:.4f} -> {scores[-1]['val_bits_per_byte']:.4f} bits/byte"
    )
    print(f"report   {report}")
    print(f"more     python -m workload sample {out}")
    return 0


def run_prepare(arguments: argparse.Namespace) -> int:
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


def run_sample(arguments: argparse.Namespace) -> int:
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


def run_eval(arguments: argparse.Namespace) -> int:
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
            micro_batch=saved.config.train.micro_batch,
            dtype=dtype,
        )
    assert score is not None
    print(
        f"step {saved.state.step}: validation loss {score.loss:.4f}, {score.bits_per_byte:.4f} bits/byte, "
        f"over {score.tokens:,} tokens of {source}"
    )
    return 0


def run_report(arguments: argparse.Namespace) -> int:
    from workload.report import save_report

    if not (arguments.run / "metrics.jsonl").exists():
        raise WorkloadError(f"{arguments.run}: no metrics.jsonl, so not a run", "name a folder below runs/")
    print(save_report(arguments.run))
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    from workload import checkpoint
    from workload.convert import export_model

    saved = checkpoint.load(find_checkpoint(arguments.run, arguments.checkpoint), only_model=True)
    notes = export_model(saved, arguments.to, arguments.out)
    print(f"step {saved.state.step} of {arguments.run} as {arguments.to}: {arguments.out}")
    for note in notes:
        print(f"note     {note}")
    return 0


def run_import(arguments: argparse.Namespace) -> int:
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


def run_explain(arguments: argparse.Namespace) -> int:
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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workload",
        description="Train GPT-2 from scratch, and use what came of it. No network is needed.",
        epilog="Begin with: python -m workload train    (minutes, on any CPU)",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=run)
        return command

    command = add("train", run_train, "train a model, or go on training one", describe_keys())
    command.add_argument(
        "--preset", help=f"where the configuration begins (default demo): {', '.join(list_presets())}"
    )
    command.add_argument("--out", type=Path, help="folder of the run (default runs/PRESET-DATE-TIME)")
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change the preset; keys are below",
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of --out, or of the newest run; naming the same --out does so too",
    )
    add_device(command)

    command = add("prepare", run_prepare, "turn text into token shards")
    command.add_argument("source", help='a text file, a folder with .txt and .md files, or "demo"')
    command.add_argument("--out", type=Path, required=True, help="folder to make")
    command.add_argument("--tokenizer", choices=("gpt2", "bytes"), default="gpt2")
    command.add_argument(
        "--val-fraction", type=float, default=0.1, help="of each text, its end (default 0.1)"
    )

    command = add("sample", run_sample, "let a model go on from a prompt")
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

    command = add("eval", run_eval, "validation loss and bits per byte of a model")
    add_run(command)
    command.add_argument("--data", help="a prepared folder or text (default: the run's)")
    command.add_argument("--sequences", type=int, default=0, help="how many, evenly spaced; 0: all (default)")
    add_device(command)

    command = add("export", run_export, "write a model as a file that other programs read")
    add_run(command)
    command.add_argument(
        "--to",
        required=True,
        choices=("hf", "nanogpt", "book"),
        help="hf: a folder for GPT2LMHeadModel; nanogpt: a ckpt.pt; book: safetensors for the book's GPTModel",
    )
    command.add_argument("--out", type=Path, required=True, help="folder (hf) or file to make")

    command = add("import", run_import, "make a run of weights from elsewhere, to sample or to train on")
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
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="configuration of training that may follow, as in train: data.source=… lr=… steps=…",
    )

    command = add("explain", run_explain, "walk one text through a model, step by step, with a picture")
    command.add_argument("text", help="a few words, at most the model's context")
    command.add_argument(
        "--checkpoint", type=Path, help="folder of a run or of a checkpoint (default: a small fresh model)"
    )
    command.add_argument(
        "--out", type=Path, default=Path("explain.html"), help="the picture (default explain.html)"
    )
    command.add_argument("--threads", type=int, default=0, help="default: the cores there are")
    command.set_defaults(device="cpu", dtype="fp32")

    command = add("report", run_report, "write a run's report.html again")
    command.add_argument("run", type=Path, help="folder of a run")
    return parser


def add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, help="folder of a run or of a checkpoint")
    command.add_argument("--checkpoint", default="best", help="of a run: best (default), latest, or a step")


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", default="auto", help="auto (a GPU when there is one), cpu, cuda or cuda:N"
    )
    command.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bf16", "fp32"),
        help="auto: bf16 where the processor has it",
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
