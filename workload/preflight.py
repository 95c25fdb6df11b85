"""What a run will need, said before the long haul: disk before the first step, time once the pace is known."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from workload.config import TrainConfig
from workload.errors import WorkloadError
from workload.progress import format_duration

SMALL_FILES_BYTES = 1 << 16  # of a checkpoint: generators, state, configuration, manifest


@dataclass(frozen=True)
class Disk:
    """Room for checkpoints."""

    checkpoint_bytes: int  # of one
    most: int  # of them at a time, the one being written included
    free_bytes: int  # there and taken by this run's checkpoints already

    @property
    def needed_bytes(self) -> int:
        return self.checkpoint_bytes * self.most


def count_kept(train: TrainConfig, steps: int) -> int:
    """Most checkpoints on the disk at a time: the newest, the best, those kept for good, the one being written."""
    for_good = steps // train.keep_every if train.keep_every else 0
    return train.keep + for_good + 2


def measure_disk(folder: Path, train: TrainConfig, steps: int, *, checkpoint_bytes: int) -> Disk:
    """`folder` holds the checkpoints, or will: what they take already counts as free."""
    taken = sum(_size(Path(parent, name)) for parent, _, names in os.walk(folder) for name in names)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return Disk(
        checkpoint_bytes=checkpoint_bytes + SMALL_FILES_BYTES,
        most=count_kept(train, steps),
        free_bytes=shutil.disk_usage(there).free + taken,
    )


def _size(path: Path) -> int:
    """Bytes; 0 for what was pruned in the meantime."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def check_disk(folder: Path, disk: Disk) -> None:
    """Refuse what cannot end well, before any work is put into it."""
    if disk.needed_bytes > disk.free_bytes:
        raise WorkloadError(
            f"{folder}: up to {disk.most} checkpoints of {format_bytes(disk.checkpoint_bytes)} each need "
            f"{format_bytes(disk.needed_bytes)}, but {format_bytes(disk.free_bytes)} are free",
            "make room, name --out on another disk, or keep fewer with --set train.keep=1 train.keep_every=0",
        )


def render_pace(*, tokens_per_s: float, mfu: float | None, eta_s: float, steps_left: int) -> str:
    """`mfu` is the part of the device's peak that is used; None where the peak is not known."""
    used = f", {100 * mfu:.1f}% of the device's peak (MFU)" if mfu is not None else ""
    return f"{tokens_per_s:,.0f} tokens/s{used}: {steps_left:,} steps more take {format_duration(eta_s)}"


def render_disk(disk: Disk) -> str:
    return (
        f"up to {disk.most} checkpoints of {format_bytes(disk.checkpoint_bytes)} are "
        f"{format_bytes(disk.needed_bytes)}; {format_bytes(disk.free_bytes)} are free"
    )


def format_bytes(count: float) -> str:
    """812 B, 30 kB, 1.5 GB: decimal, as disks are sold."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
