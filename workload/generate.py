"""Sampling: one token at a time, with a cache of keys and values."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from workload.device import autocast
from workload.model import GPT2, Cache
from workload.tokenizer import Tokenizer


@torch.no_grad()
def generate(
    model: GPT2,
    prompt: Sequence[int],
    count: int,
    *,
    n_vocab: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 200,
    dtype: torch.dtype = torch.float32,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yield `count` tokens that follow `prompt` (at least one token), fewer when told to stop.

    temperature 0 takes the likeliest token; top_k 0 considers all. Rows of the embedding from `n_vocab` on belong to
    no token and are never drawn. Draws come from a generator of their own, so sampling during training changes
    nothing. When the context is full its older half is forgotten.
    """
    device = model.wte.weight.device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    n_ctx = model.config.n_ctx
    tokens = list(prompt)[-n_ctx:]
    cache: Cache | None = None
    fresh = tokens
    training = model.training
    model.eval()
    try:
        for _ in range(count):
            if should_stop():
                return
            if cache is None or cache.length + len(fresh) > n_ctx:
                fresh = tokens = tokens[-n_ctx:] if cache is None else tokens[-(n_ctx // 2 or 1) :]
                cache = Cache(model.config, 1, device=device, dtype=dtype)
            with autocast(device, dtype):
                x = model.hidden(torch.tensor([fresh], device=device), cache)
                logits = model.head(x[:, -1])[0, :n_vocab].float().cpu()
            token = draw(logits, temperature, top_k, generator)
            fresh = [token]
            tokens.append(token)
            yield token
    finally:
        model.train(training)


def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token number from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if 0 < top_k < logits.numel():
        lowest = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    return int(torch.multinomial(logits.softmax(0), 1, generator=generator))


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text as its tokens come; characters are held back until all their bytes are there."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token == tokenizer.eot:
            yield "\n\n"
        elif text := decoder.decode(tokenizer.to_bytes(token)):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
