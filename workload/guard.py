"""Which updates are left out, and when a run goes back: a pure function over the losses and gradient norms so far.

An update whose loss or gradient norm is not finite, or stands `train.guard` deviations above its mean over the last
`train.guard_window` updates, is left out before it happens: weights that became NaN do not recover, a batch left out is
not missed. After MOST_SKIPS of them in a row the weights themselves are to blame: the run goes back to a checkpoint and
on to other data. After MOST_ROLL_BACKS of that it ends.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MOST_SKIPS = 8  # updates left out in a row
MOST_ROLL_BACKS = 3  # without CALM updates between them
CALM = 1000  # updates after which a roll-back is forgotten
# A deviation is at least this. The loss: one hundredth of it is noise. The norm: less than 4.5 times the usual one is
# left to clipping; a healthy run of the demo's text had 2.9 times, 6.4 deviations, once in 300 updates.
LEAST_LOSS_DEVIATION = 0.01  # of the mean
LEAST_NORM_DEVIATION = 0.25  # of the logarithm


@dataclass(frozen=True)
class Guard:
    """What is remembered of the updates so far, oldest first."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()  # natural logarithms of gradient norms: these grow and fall by factors
    skips: int = 0  # updates left out in a row, up to now
    roll_backs: int = 0
    calm: int = 0  # updates made since the last of these


def judge(guard: Guard, loss: float, norm: float, *, deviations: float, window: int) -> tuple[Guard, str]:
    """The guard after an update with this loss and gradient norm, and why the update is to be left out, or "".

    Spikes are looked for once half of the window is filled. What is left out does not enter the mean.
    """
    reason = _reason(guard, loss, norm, deviations, max(2, window // 2))
    if reason:
        return replace(guard, skips=guard.skips + 1), reason
    calm = guard.calm + 1
    return Guard(
        losses=(*guard.losses, loss)[-window:],
        norms=(*guard.norms, _log(norm))[-window:],
        roll_backs=guard.roll_backs if calm < CALM else 0,
        calm=calm,
    ), ""


def roll_back(then: Guard, now: Guard) -> Guard:
    """The guard of a run that goes back: the means as they were then, the roll-backs as they are now."""
    return replace(then, skips=0, roll_backs=now.roll_backs + 1, calm=0)


def gather_guard(guard: Guard) -> dict[str, Tensor]:
    """``losses``, ``norms``, ``counts`` as tensors that hold every bit."""
    return {
        "losses": torch.tensor(guard.losses, dtype=torch.float64),
        "norms": torch.tensor(guard.norms, dtype=torch.float64),
        "counts": torch.tensor([guard.skips, guard.roll_backs, guard.calm]),
    }


def restore_guard(state: Mapping[str, Tensor]) -> Guard:
    """What `gather_guard` gave; a guard that has seen nothing for a checkpoint from before there were any."""
    if not state:
        return Guard()
    skips, roll_backs, calm = (int(count) for count in state["counts"])
    return Guard(tuple(state["losses"].tolist()), tuple(state["norms"].tolist()), skips, roll_backs, calm)


def _reason(guard: Guard, loss: float, norm: float, deviations: float, least: int) -> str:
    for what, value in (("loss", loss), ("gradient", norm)):
        if not math.isfinite(value):
            return f"a {what} that is not finite"
    if deviations <= 0 or len(guard.losses) < least:
        return ""
    mean, deviation = _spread(guard.losses)
    above = (loss - mean) / max(deviation, LEAST_LOSS_DEVIATION * abs(mean), 1e-12)
    if above > deviations:
        return f"a loss of {loss:.4g}, {above:.1f} deviations above its mean of {mean:.4g}"
    mean, deviation = _spread(guard.norms)
    above = (_log(norm) - mean) / max(deviation, LEAST_NORM_DEVIATION)
    if above > deviations:
        return f"a gradient norm of {norm:.4g}, {above:.1f} deviations above its mean of {math.exp(mean):.4g}"
    return ""


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
