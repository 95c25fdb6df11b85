"""Training and sampling next to nanoGPT and to the code of "Build a Large Language Model (From Scratch)".

    python -m tests.benchmarks.training --nanogpt PATH --book PATH [--rounds 5] [--threads 2] [--only WORD] [--out FILE]

PATH is a checkout of karpathy/nanoGPT or of rasbt/LLMs-from-scratch, or a bare repository of it; who is not given is
left out. Nothing of theirs is copied: their own model.py and gpt.py are run, with the body of their own loops:

    nanoGPT   train.py on a CPU: forward, backward, clip at 1.0, configure_optimizers' AdamW; compile off (eager)
    book      train_model_simple: forward, F.cross_entropy, backward, torch.optim.AdamW; manual attention, untied head
    ours      the model's loss, backward, clip at 1.0 and the optimizer of `python -m workload train`, without its log and guard

Each is a process of its own and does the same work on the same batches; they take turns, in another order each round,
and only the one whose turn it is runs. Ratios are of one round, so what else the machine does weighs on all. All have
the same threads, fp32, no dropout, and threads that wait as ours do (workload.__main__: asleep, or spinning briefly for
a sample), which only helps on a busy machine. Ours keeps freed memory (device.keep_memory), as it does for its users.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.benchmarks.results import write_part
from workload.__main__ import BRIEF_WAITS, WAITS

ROOT = Path(__file__).resolve().parents[2]
TITLE = "# Training and sampling on a CPU, next to nanoGPT and the book's code"
FILES = {"nanogpt": "model.py", "book": "ch04/01_main-chapter-code/gpt.py"}
NAMES = {"ours": "ours", "nanogpt": "nanoGPT", "book": "book"}
BATCH, CONTEXT, LAYERS, HEADS, CHANNELS = 12, 256, 6, 6, 384
PROMPT = 64


@dataclass(frozen=True)
class Task:
    """One kind of work, done by each contestant."""

    name: str
    who: tuple[str, ...]
    vocab: int
    new_tokens: int = 0  # to generate at 124M; 0: training steps
    units: int = 1  # steps or samples a turn
    targets: tuple[tuple[str, float], ...] = ()  # how many times as long they should take, at least


TASKS = (
    Task(
        "train, vocabulary 50257",
        ("ours", "nanogpt", "book"),
        50257,
        targets=(("nanogpt", 1.6), ("book", 1.7)),
    ),
    Task("train, vocabulary 65", ("ours", "nanogpt", "book"), 65, units=2, targets=(("nanogpt", 1.1),)),
    Task("sample, 64 + 24 tokens", ("ours", "nanogpt"), 50257, new_tokens=24, targets=(("nanogpt", 5.0),)),
    Task("sample, 64 + 512 tokens", ("ours", "nanogpt"), 50257, new_tokens=512, targets=(("nanogpt", 20.0),)),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--book", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--long-rounds", type=int, default=2, help="of 64 + 512 tokens, where nanoGPT needs minutes"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="tasks with this in their name")
    parser.add_argument("--out", type=Path, help="a RESULTS.md whose part is to be written")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(**json.loads(arguments.worker))
        return
    with ExitStack() as stack:
        folders, commits = {"ours": ROOT}, {"ours": _commit(ROOT)}
        for who in ("nanogpt", "book"):
            if path := getattr(arguments, who):
                commits[who] = _commit(path)
                folders[who] = stack.enter_context(checkout(path, FILES[who]))
        tasks = [task for task in TASKS if arguments.only in task.name]
        loads = [f"{os.getloadavg()[0]:.1f}"]
        results = []
        for task in tasks:
            rounds = arguments.long_rounds if task.new_tokens > 100 else arguments.rounds
            results.append((task, race(task, folders, rounds, arguments.threads)))
            loads.append(f"{os.getloadavg()[0]:.1f}")
    text = render(results, commits, arguments, loads)
    print(text)
    if arguments.out:
        write_part(text, arguments.out)


@contextmanager
def checkout(path: Path, file: str) -> Iterator[Path]:
    """`path` where it has the file, else what its newest commit has, in a scratch folder."""
    if (path / file).exists():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="checkout-") as scratch:
        archive = subprocess.run(
            ["git", "-C", path, "archive", "HEAD", file], check=True, stdout=subprocess.PIPE
        ).stdout
        subprocess.run(["tar", "-x", "-C", scratch], input=archive, check=True)
        yield Path(scratch)


def _commit(path: Path) -> str:
    found = subprocess.run(
        ["git", "-C", path, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "?"


def race(
    task: Task, folders: dict[str, Path], rounds: int, threads: int
) -> dict[str, list[dict[str, float]]]:
    """Contestant → what each of its turns gave: seconds and processor seconds a unit, and the loss after it."""
    who = [name for name in task.who if name in folders]
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in who}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(start(task, name, folders[name], threads)) for name in who}
        for name in who:
            ask(workers[name], 1)  # warm
        for turn in range(rounds):
            order = who[turn % len(who) :] + who[: turn % len(who)]
            for name in order:
                turns[name].append(ask(workers[name], task.units))
            told = ", ".join(
                f"{NAMES[name]} {turns[name][-1]['seconds']:.3f} s ({turns[name][-1]['cpu']:.3f})"
                for name in who
            )
            print(f"{task.name}, round {turn + 1}: {told}", file=sys.stderr, flush=True)
    return turns


@contextmanager
def start(task: Task, who: str, folder: Path, threads: int) -> Iterator["subprocess.Popen[str]"]:
    what = {
        "who": who,
        "folder": str(folder),
        "threads": threads,
        "vocab": task.vocab,
        "new_tokens": task.new_tokens,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.training", "--worker", json.dumps(what)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | (BRIEF_WAITS if task.new_tokens else WAITS),
    )
    with process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def ask(worker: "subprocess.Popen[str]", units: int) -> dict[str, float]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{units}\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit("a contestant ended early; its complaint is above")
    return dict(json.loads(answer))


def work(who: str, folder: str, threads: int, vocab: int, new_tokens: int) -> None:
    """The contestant's side: a number of units on each line of stdin, seconds and loss on each line of stdout."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    makers = {
        ("ours", False): our_step,
        ("nanogpt", False): nanogpt_step,
        ("book", False): book_step,
        ("ours", True): our_sample,
        ("nanogpt", True): nanogpt_sample,
    }
    with redirect_stdout(sys.stderr):
        unit = makers[who, new_tokens > 0](Path(folder), new_tokens or vocab)
    for line in sys.stdin:
        count, losses = int(line), []
        started, busy = time.perf_counter(), time.process_time()
        for _ in range(count):
            losses.append(unit())
        taken = {
            "seconds": (time.perf_counter() - started) / count,
            "cpu": (time.process_time() - busy) / count,  # of all threads
            "loss": losses[-1],
        }
        print(json.dumps(taken), flush=True)


def load_module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def batches(vocab: int) -> Iterator[Any]:
    """(ids, targets), the same for every contestant: words of a small set, so that there is something to learn."""
    import torch

    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(0, min(vocab, 1000), (BATCH, CONTEXT + 1), generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def our_step(folder: Path, vocab: int) -> Callable[[], float]:
    import torch

    from workload.config import ModelConfig, TrainConfig
    from workload.device import keep_memory
    from workload.model import GPT2
    from workload.optim import make_optimizer

    keep_memory()
    torch.set_float32_matmul_precision("high")
    model = GPT2(
        ModelConfig(n_layer=LAYERS, n_head=HEADS, n_embd=CHANNELS, n_ctx=CONTEXT, vocab_size=vocab)
    ).train()
    optimizer = make_optimizer(model, TrainConfig(lr=1e-3))
    data = batches(vocab)

    def step() -> float:
        ids, targets = next(data)
        loss = model.loss(ids, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def nanogpt_step(folder: Path, vocab: int) -> Callable[[], float]:
    import torch

    theirs = load_module(folder / FILES["nanogpt"], "nanogpt_model")
    model = theirs.GPT(
        theirs.GPTConfig(
            block_size=CONTEXT, vocab_size=vocab, n_layer=LAYERS, n_head=HEADS, n_embd=CHANNELS, dropout=0.0
        )
    ).train()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    data = batches(vocab)

    def step() -> float:
        ids, targets = next(data)
        _, loss = model(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def book_step(folder: Path, vocab: int) -> Callable[[], float]:
    import torch

    theirs = load_module(folder / FILES["book"], "book_gpt")
    model = theirs.GPTModel(
        {
            "vocab_size": vocab,
            "context_length": CONTEXT,
            "emb_dim": CHANNELS,
            "n_heads": HEADS,
            "n_layers": LAYERS,
            "drop_rate": 0.0,
            "qkv_bias": False,
        }
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    data = batches(vocab)

    def step() -> float:
        optimizer.zero_grad()
        ids, targets = next(data)
        logits = model(ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step


def our_sample(folder: Path, new_tokens: int) -> Callable[[], float]:
    import torch

    from workload.config import load_config
    from workload.device import keep_memory
    from workload.generate import generate
    from workload.model import GPT2

    keep_memory()
    model = GPT2(load_config("gpt2-124m").model).eval()
    prompt = torch.randint(0, 50257, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()

    def sample() -> float:
        tokens = list(generate(model, prompt, new_tokens, n_vocab=50257, seed=1, temperature=0.8, top_k=200))
        return float(len(tokens))

    return sample


def nanogpt_sample(folder: Path, new_tokens: int) -> Callable[[], float]:
    import torch

    theirs = load_module(folder / FILES["nanogpt"], "nanogpt_model")
    model = theirs.GPT(theirs.GPTConfig(vocab_size=50257)).eval()
    prompt = torch.randint(0, 50257, (1, PROMPT), generator=torch.Generator().manual_seed(1))

    def sample() -> float:
        tokens = model.generate(prompt, new_tokens, temperature=0.8, top_k=200)
        return float(tokens.size(1) - PROMPT)

    return sample


def render(
    results: list[tuple[Task, dict[str, list[dict[str, float]]]]],
    commits: dict[str, str],
    arguments: argparse.Namespace,
    loads: list[str],
) -> str:
    """The part of RESULTS.md."""
    import torch

    given = " ".join(f"--{who} …" for who in ("nanogpt", "book") if who in commits)
    lines = [
        TITLE,
        "",
        f"Written by `python -m tests.benchmarks.training {given} --rounds {arguments.rounds}`; not by hand.",
        "",
        f"Training: {LAYERS} layers, {HEADS} heads, {CHANNELS} channels, context {CONTEXT}, batch {BATCH}, fp32, no",
        "dropout; forward, backward, clipping (not the book's), AdamW. Sampling: 124M, temperature 0.8, top-k 200. A process",
        "each, in turns, the same batches; ratios within a round: median (lowest to highest).",
        "",
        "## How many times as long as ours",
        "",
        "| | " + " | ".join(task.name for task, _ in results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    others: list[str] = [who for who in ("nanogpt", "book") if who in commits]
    for who in others:
        cells = [_spread(_ratios(turns, who), 2) if who in turns else "-" for _, turns in results]
        lines.append(f"| {NAMES[who]} | " + " | ".join(cells) + " |")
    lines.append("")
    for task, turns in results:
        for who, target in task.targets:
            if who in turns:
                seen = statistics.median(_ratios(turns, who))
                verdict = "met" if seen >= target else "missed"
                lines.append(
                    f"- {task.name}, at least {target:g} times {NAMES[who]}'s speed: {verdict}, {seen:.2f}"
                )
    lines += ["", "## How many times the processor time, which other programs disturb less", ""]
    lines.append("| | " + " | ".join(task.name for task, _ in results) + " |")
    lines.append("|---" * (len(results) + 1) + "|")
    for who in others:
        cells = [_spread(_ratios(turns, who, "cpu"), 2) if who in turns else "-" for _, turns in results]
        lines.append(f"| {NAMES[who]} | " + " | ".join(cells) + " |")
    lines += ["", "## Tokens a second", "", "| | " + " | ".join(task.name for task, _ in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for who in ["ours", *others]:
        cells = []
        for task, turns in results:
            tokens = task.new_tokens or BATCH * CONTEXT
            cells.append(
                _spread([tokens / turn["seconds"] for turn in turns[who]], 0) if who in turns else "-"
            )
        lines.append(f"| {NAMES[who]} | " + " | ".join(cells) + " |")
    losses = [
        f"{task.name}: " + ", ".join(f"{NAMES[who]} {turns[who][-1]['loss']:.3f}" for who in turns)
        for task, turns in results
        if not task.new_tokens
    ]
    versions = ", ".join(f"{NAMES[who]} {commit}" for who, commit in commits.items())
    lines += [
        "",
        f"Loss after the last step, to see that all learn: {'; '.join(losses) or '-'}.",
        "",
        f"State of the machine: {_processor()}, {os.cpu_count()} processors, {arguments.threads} threads, load (1 minute) "
        f"before and after each column {', '.join(loads)}; Linux {platform.release()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}; {versions}.",
    ]
    return "\n".join(lines) + "\n"


def _ratios(turns: dict[str, list[dict[str, float]]], who: str, measure: str = "seconds") -> list[float]:
    return [theirs[measure] / ours[measure] for theirs, ours in zip(turns[who], turns["ours"], strict=True)]


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


if __name__ == "__main__":
    main()
