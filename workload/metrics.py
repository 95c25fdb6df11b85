"""metrics.jsonl: one JSON object a line, appended and flushed, cut back to a checkpoint on resume.

    {"kind": "step",   "step": 12, "loss": …, "lr": …, "grad_norm": …, "tokens": …, "tokens_per_s": …, "elapsed_s": …}
    {"kind": "eval",   "step": 100, "val_loss": …, "val_bits_per_byte": …, "elapsed_s": …}
    {"kind": "sample", "step": 100, "prompt": …, "text": …}
    {"kind": "event",  "step": 100, "text": …}

On a GPU a step may also have mfu (0 … 1 of the device's peak), memory_bytes, temperature_c and power_w.
loss and val_loss are nats a token; step is the number of updates done. Fields named in TIMING depend on the clock;
all others are the same whether a run was interrupted or not.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

TIMING = ("tokens_per_s", "elapsed_s", "mfu", "memory_bytes", "temperature_c", "power_w")
Row = dict[str, Any]


class Metrics:
    """The open file of a run."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        """Open for appending after the first `keep_bytes` bytes; what follows them is work that was lost."""
        if path.exists() and path.stat().st_size > keep_bytes:
            os.truncate(path, keep_bytes)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: object) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n")
        self._file.flush()

    def sync(self) -> int:
        """Bring it to the disk; returns its length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def load_rows(path: Path) -> Iterator[Row]:
    """Rows of the file, less a last line that is being written."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
