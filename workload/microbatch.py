"""How many sequences go through the network at once: as many as are fastest and fit the memory.

The tokens of a step stay what `train.batch` says; a smaller micro-batch only adds up more gradients before the update.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from workload.faults import is_out_of_memory

# A CPU gains nothing from more once its cores are busy, and its memory is also the desktop's.
CPU_TOKENS = 4096
HEADROOM = 0.92  # of a GPU's memory: what is left is for fragments, for sampling and for the desktop
WORTH = 1.01  # a larger size must be this much faster: memory that buys nothing is better left free


@dataclass(frozen=True)
class Trial:
    """What one size did."""

    size: int
    tokens_per_s: float  # 0.0: did not fit


def sizes(batch: int) -> list[int]:
    """The divisors of `batch` to be tried, ascending, each at least half as large again as the one before."""
    tried: list[int] = []
    for size in range(1, batch + 1):
        if batch % size == 0 and (not tried or size >= 1.5 * tried[-1] or size == batch):
            tried.append(size)
    return tried


def largest_divisor(batch: int, most: int) -> int:
    """Of `batch`, of at most `most`; 1 where that is less."""
    return next(size for size in range(max(1, min(batch, most)), 0, -1) if batch % size == 0)


def smaller(batch: int, size: int) -> int | None:
    """The largest divisor of `batch` of at most half of `size`; None below 1."""
    return largest_divisor(batch, size // 2) if size > 1 else None


def bounded(batch: int, n_ctx: int, most_tokens: int = CPU_TOKENS) -> int:
    """The largest divisor of `batch` with at most `most_tokens` tokens, or 1: arithmetic, so every start has the same."""
    return largest_divisor(batch, most_tokens // n_ctx)


def probe(candidates: Sequence[int], try_size: Callable[[int], float]) -> list[Trial]:
    """Try sizes in this order until one does not fit, or two in a row are slower than the best.

    `try_size` runs real steps and returns tokens/s; it raises torch.OutOfMemoryError for what does not fit.
    """
    trials: list[Trial] = []
    for size in candidates:
        try:
            rate = try_size(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            rate = 0.0
        trials.append(Trial(size, rate))
        best = max(trial.tokens_per_s for trial in trials)
        if rate == 0.0 or all(trial.tokens_per_s < best for trial in trials[-2:]):
            break
    return trials


def choose(trials: Sequence[Trial]) -> int | None:
    """The smallest size that is within 1% of the fastest; None when none fits."""
    best = max(trial.tokens_per_s for trial in trials)
    if best == 0.0:
        return None
    return next(trial.size for trial in trials if trial.tokens_per_s * WORTH >= best)


def time_steps(step: Callable[[], object], clock: Callable[[], float], steps: int = 3) -> float:
    """Seconds of the middle one of `steps`, after one that is not counted."""
    step()
    taken = []
    for _ in range(steps):
        begun = clock()
        step()
        taken.append(clock() - begun)
    return statistics.median(taken)


def free_memory(device: torch.device) -> None:
    """Give what torch keeps for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def over_headroom(device: torch.device) -> bool:
    """Whether the steps since the last `reset_peak` came closer to the device's memory than is safe."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return torch.cuda.max_memory_reserved(device) > HEADROOM * (free + torch.cuda.memory_reserved(device))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
