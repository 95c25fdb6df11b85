"""Sampling: one token at a time, with a cache of keys and values."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from workload.device import autocast
from workload.model import GPT2, Cache
from workload.tokenizer import Tokenizer


def generate(
    model: GPT2,
    prompt: Sequence[int],
    count: int,
    *,
    n_vocab: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 200,
    top_p: float = 1.0,
    dtype: torch.dtype = torch.float32,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yield `count` tokens that follow `prompt` (at least one token), fewer when told to stop. As `generate_several`."""
    rows = generate_several(
        model,
        prompt,
        count,
        samples=1,
        n_vocab=n_vocab,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        dtype=dtype,
        should_stop=should_stop,
    )
    return (row[0] for row in rows)


@torch.no_grad()
def generate_several(
    model: GPT2,
    prompt: Sequence[int],
    count: int,
    *,
    samples: int,
    n_vocab: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 200,
    top_p: float = 1.0,
    dtype: torch.dtype = torch.float32,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[list[int]]:
    """Yield `count` times the next token of each of `samples` texts that go on from the same `prompt`, as one batch.

    temperature 0 takes the likeliest token; top_k 0 and top_p 1 consider all (see `draw`). Rows of the embedding from
    `n_vocab` on belong to no token and are never drawn. Sample i has the draws of seed + i, from a generator of its
    own, so sampling during training changes nothing. When the context is full its older half is forgotten.
    """
    device = model.wte.weight.device
    if device.type == "cpu":
        # A token multiplies each weight once or a few times: turning all of them into bf16 before costs more than that.
        dtype = torch.float32
    # on the CPU: the same draws on every device
    generators = [torch.Generator().manual_seed(seed + i) for i in range(samples)]
    n_ctx = model.config.n_ctx
    tokens = [list(prompt)[-n_ctx:]] * samples
    cache: Cache | None = None
    fresh = tokens[:1]  # the prompt goes through the network once, however many go on from it
    training = model.training
    model.eval()
    try:
        for _ in range(count):
            if should_stop():
                return
            if cache is None or cache.length + len(fresh[0]) > n_ctx:
                if cache is not None:
                    fresh = tokens = [row[-(n_ctx // 2 or 1) :] for row in tokens]
                cache = Cache(model.config, len(fresh), device=device, dtype=dtype)
            with autocast(device, dtype):
                x = model.hidden(torch.tensor(fresh, device=device), cache)
                logits = model.head(x[:, -1])[:, :n_vocab].float().cpu()
            if len(fresh) < samples:
                logits = logits.expand(samples, -1)
                cache = cache.repeat(samples)
            drawn = [
                draw(row, temperature, top_k, top_p, generator)
                for row, generator in zip(logits, generators, strict=True)
            ]
            fresh = [[token] for token in drawn]
            tokens = [row + new for row, new in zip(tokens, fresh, strict=True)]
            yield drawn
    finally:
        model.train(training)


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token number from logits (V,).

    Of the top_k likeliest tokens (0: all), those that together have at least top_p of the probability, as few as
    do: the nucleus of Holtzman et al. 2019, arXiv 1904.09751, section 3.1.
    """
    if temperature == 0:
        return int(logits.argmax())
    is_cut = 0 < top_k < logits.numel()
    if not is_cut and top_p >= 1:
        return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
    largest, tokens = logits.topk(top_k) if is_cut else logits.sort(descending=True)
    p = (largest / temperature).softmax(0)
    if top_p < 1:
        p = p.where(p.cumsum(0) - p < top_p, 0.0)  # the likeliest always stays: nothing is before it
    return int(tokens[torch.multinomial(p, 1, generator=generator)])


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
