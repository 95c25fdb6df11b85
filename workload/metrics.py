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
import math
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from workload.errors import WorkloadError

TIMING = ("tokens_per_s", "elapsed_s", "mfu", "memory_bytes", "temperature_c", "power_w")
STEP_COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", *TIMING)
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
    """Rows of the file, less a last line that is being written. Raises WorkloadError at a line that is no row."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                row = parse_row(line)
                if row is None:
                    raise WorkloadError(
                        f"{path}, line {number}: not a row of JSON: {line[:60].decode(errors='replace').strip()}",
                        f"remove that line, for example with sed -i {number}d {path}",
                    )
                yield row


def parse_row(line: bytes) -> Row | None:
    """The object of a line; None when it is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


class Log:
    """Everything that metrics.jsonl says, kept in columns so that a long run stays small; `read` takes in what is new.

    What cannot be read is left out and counted: a report of a damaged log says so, and is still one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.steps: dict[str, array[float]] = {name: array("d") for name in STEP_COLUMNS}  # NaN: not there
        self.evals: list[Row] = []
        self.samples: list[Row] = []
        self.events: list[Row] = []
        self.damaged: list[int] = []  # numbers of lines
        self._offset = self._lines = 0
        self._last = b""

    def read(self) -> "Log":
        """Take in the lines that were added; from the beginning when the file was cut back, as a resume does."""
        if not self.path.exists():
            self._forget()
            return self
        with self.path.open("rb") as file:
            file.seek(max(0, self._offset - len(self._last)))
            if file.read(len(self._last)) != self._last:
                self._forget()
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._lines += 1
                self._last = line
                self._take(line)
        return self

    def _take(self, line: bytes) -> None:
        row = parse_row(line)
        if row is None or not math.isfinite(number(row, "step")):
            self.damaged.append(self._lines)
        elif row.get("kind") == "step":
            for name, column in self.steps.items():
                column.append(number(row, name))
        elif row.get("kind") == "eval":
            self.evals.append(row)
        elif row.get("kind") == "sample":
            self.samples.append(row)
        elif row.get("kind") == "event":
            self.events.append(row)


def number(row: Row, key: str) -> float:
    """The number at `key`; NaN for null, for anything else, and when it is not there."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
