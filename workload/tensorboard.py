"""A run's metrics as TensorBoard's event files, for who looks at many runs there. Needs the package tensorboard."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from workload.errors import WorkloadError
from workload.metrics import number
from workload.report import Record

STEP_TAGS = {
    "loss": "loss/train",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "memory_bytes": "gpu/memory_bytes",
    "temperature_c": "gpu/temperature_c",
    "power_w": "gpu/power_w",
}
EVAL_TAGS = {"val_loss": "loss/val", "val_bits_per_byte": "loss/val_bits_per_byte"}


def save_events(record: Record, folder: Path) -> Path:
    """Write `folder`/NAME with the run's scalars, samples and events; returns it.

    Raises WorkloadError when it holds a run already, for TensorBoard would draw both as one, or without tensorboard.
    """
    try:
        writers: Any = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise WorkloadError(
            f"event files need the package tensorboard: {error}", "pip install tensorboard"
        ) from error
    out = folder / record.name
    if out.exists() and any(out.iterdir()):
        raise WorkloadError(f"{out} exists and is not empty", "name another --tensorboard, or remove it")
    steps, elapsed_s = record.column("step"), np.nan_to_num(record.column("elapsed_s"))
    # TensorBoard wants the time of day; the log has seconds since the beginning, and the file the time of its end.
    path = record.log.path
    begun_s = path.stat().st_mtime - (elapsed_s[-1] if elapsed_s.size else 0.0) if path.exists() else 0.0
    writer = writers.SummaryWriter(str(out))
    try:
        for name, tag in STEP_TAGS.items():
            column = record.column(name)
            for i in np.flatnonzero(np.isfinite(column)):
                writer.add_scalar(tag, column[i], int(steps[i]), walltime=begun_s + float(elapsed_s[i]))
        for row in record.log.evals:
            for name, tag in EVAL_TAGS.items():
                value = number(row, name)
                if np.isfinite(value):
                    at_s = begun_s + float(np.nan_to_num(number(row, "elapsed_s")))
                    writer.add_scalar(tag, value, int(row["step"]), walltime=at_s)
        for row in record.log.samples:
            text = f"{row.get('prompt', '')}{row.get('text', '')}"
            # Four spaces: Markdown shows it as it is.
            text = "\n".join(f"    {line}" for line in text.splitlines())
            writer.add_text("sample", text, int(row["step"]), walltime=begun_s)
        for row in record.log.events:
            writer.add_text("event", str(row.get("text", "")), int(row["step"]), walltime=begun_s)
    finally:
        writer.close()
    return out
