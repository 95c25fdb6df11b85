"""Validation loss, per token and per byte."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workload.data import Tokens, cut, spread
from workload.device import autocast
from workload.model import GPT2


@dataclass(frozen=True)
class Score:
    loss: float  # nats a token
    bits_per_byte: float  # of text, so tokenizers can be compared
    tokens: int  # scored


@torch.no_grad()
def evaluate(
    model: GPT2,
    shards: Sequence[Tokens],
    token_bytes: Sequence[int],
    *,
    sequences: int,
    micro_batch: int,
    dtype: torch.dtype,
    should_stop: Callable[[], bool] = lambda: False,
) -> Score | None:
    """Score `sequences` windows at equal distances over `shards` (0: all); None when told to stop.

    token_bytes: the length of every token in bytes; end-of-text has 0, so its nats count and its bytes do not.
    """
    device = model.wte.weight.device
    n_ctx = min(model.config.n_ctx, max(len(shard) for shard in shards) - 1)
    places = spread(shards, n_ctx, sequences)
    lengths = np.array(token_bytes, dtype=np.int64)
    nats, n_tokens, n_bytes = 0.0, 0, 0
    training = model.training
    model.eval()
    for first in range(0, len(places), micro_batch):
        if should_stop():
            break
        batch = cut(shards, places[first : first + micro_batch], n_ctx)
        ids = torch.from_numpy(batch).to(device)
        with autocast(device, dtype):
            losses = model.loss(ids[:, :-1], ids[:, 1:], reduction="none")
        nats += float(losses.double().sum())
        n_tokens += losses.numel()
        n_bytes += int(lengths[batch[:, 1:]].sum())
    model.train(training)
    if should_stop():
        return None
    return Score(nats / n_tokens, nats / (math.log(2) * n_bytes), n_tokens)
