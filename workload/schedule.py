"""The learning rate, and how a run fits its steps into the time that it has."""

import math

from workload.config import TrainConfig


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """The rate of update `step` (0 … steps-1) of `steps`: a linear warm-up, then `train.schedule` down to lr_end · lr.

    cosine  half a cosine from lr to lr_end · lr
    wsd     warm-up, stable, decay: lr, then in the last `train.decay` of the steps 1 - √ of how far that has come.
            What was trained before the decay serves longer runs too (arXiv 2405.18392, which found the root better
            than a straight line).

    The first update has lr / warmup, update warmup - 1 has lr, the last has lr_end · lr. A run shorter than twice
    its warm-up warms up in half of its steps.
    """
    warmup = min(train.warmup, steps // 2)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "wsd":
        cooling = max(1, min(steps - warmup, round(train.decay * steps)))
        done = min(1.0, max(0.0, (step + 1 - (steps - cooling)) / cooling))
        kept = 1 - math.sqrt(done)
    else:
        done = min(1.0, (step - warmup + 1) / max(1, steps - warmup))
        kept = 0.5 * (1 + math.cos(math.pi * done))
    return train.lr * (train.lr_end + (1 - train.lr_end) * kept)


def fit_steps(
    step: int, steps: int, asked: int, elapsed_s: float, max_seconds: float, since: tuple[int, float]
) -> int:
    """How many of the `asked` steps fit into max_seconds, when `step` of the planned `steps` are done.

    The pace is that since `since` (step, elapsed_s). A plan that is within 5% stays: a machine that is fast enough
    runs the same schedule every time, and one whose pace wavers does not waver with it. 0 seconds: no limit.
    """
    done, took_s = step - since[0], elapsed_s - since[1]
    if max_seconds <= 0 or done <= 0 or took_s <= 0 or step >= steps:
        return steps
    fitting = min(asked, max(step + 1, step + int((max_seconds - elapsed_s) * done / took_s)))
    return fitting if abs(fitting - steps) > 0.05 * steps else steps
