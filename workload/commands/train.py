"""python -m workload train."""

import argparse
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from workload.commands.common import (
    RUNS,
    add_command,
    add_device,
    describe_keys,
    prepare_device,
    stop_on_signals,
)
from workload.config import list_presets
from workload.errors import WorkloadError

if TYPE_CHECKING:
    from workload.commands.common import Commands


def add(commands: "Commands") -> None:
    command = add_command(commands, "train", run, "train a model, or go on training one", describe_keys())
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


def run(arguments: argparse.Namespace) -> int:
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
