"""Validation loss of settings against each other, at equal tokens and with the same seeds.

    python -m tests.benchmarks.optimizers --steps 540 --seeds 1 2 3 "optimizer=adamw" "optimizer=muon muon_lr=0.02"

Each is a run of the demo preset with these settings on top, on one thread, in the order that interleaves them. The loss
is that of the whole validation split at the last step. Seconds are shown, but say little where anything else runs.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from workload.config import load_config
from workload.device import choose_device, choose_dtype, keep_memory, read_cpu_flags
from workload.metrics import load_rows
from workload.progress import Reporter
from workload.train import train


def measure(
    preset: str, settings: list[str], device: torch.device, dtype: torch.dtype, record: Path | None
) -> tuple[float, float, float]:
    """(validation loss, bits a byte, seconds of training) of one run; its updates go to a line of `record`."""
    config = load_config(
        preset,
        [
            "max_seconds=0",
            "eval_sequences=0",
            "sample_tokens=0",
            "eval_every=1000000",
            "save_every=1000000",
            *settings,
        ],
    )
    with tempfile.TemporaryDirectory(prefix="optimizers-") as folder:
        out = Path(folder) / "run"
        reporter = Reporter(io.StringIO(), time.monotonic, 1_000_000)
        train(config, out, device=device, dtype=dtype, reporter=reporter)
        rows = list(load_rows(out / "metrics.jsonl"))
    steps = [row for row in rows if row["kind"] == "step"]
    if record is not None:
        updates = {key: [row[key] for row in steps] for key in ("loss", "grad_norm")}
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"settings": settings, **updates}) + "\n")
    score = [row for row in rows if row["kind"] == "eval"][-1]
    return score["val_loss"], score["val_bits_per_byte"], steps[-1]["elapsed_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare settings at equal tokens.")
    parser.add_argument("settings", nargs="+", help='each one run: "key=value key=value"')
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=540)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument(
        "--record", type=Path, help="JSON lines of the loss and gradient norm of every update"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    if device.type == "cpu":
        keep_memory()
    dtype = choose_dtype(arguments.dtype, device, read_cpu_flags())
    losses: dict[str, list[float]] = {text: [] for text in arguments.settings}
    for seed in arguments.seeds:
        for text in arguments.settings:
            settings = [f"steps={arguments.steps}", f"seed={seed}", *text.split()]
            loss, bits, seconds = measure(arguments.preset, settings, device, dtype, arguments.record)
            losses[text].append(loss)
            print(f"{loss:.4f}  {bits:.4f} bits/byte  {seconds:6.1f} s  seed {seed}  {text}", flush=True)
    print(f"\nmean ± deviation over {len(arguments.seeds)} seeds, {arguments.steps} steps, {dtype}")
    for text, values in sorted(losses.items(), key=lambda item: statistics.mean(item[1])):
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{statistics.mean(values):.4f} ± {spread:.4f}  {text}")


if __name__ == "__main__":
    main()
