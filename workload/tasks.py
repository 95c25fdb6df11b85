"""Scores of a model on published tasks and on a text, from local files.

HellaSwag   rowanz/hellaswag's hellaswag_val.jsonl: {"ctx": "…", "endings": ["…", 4 of them], "label": 0…3} a line.
            The model's choice is the ending of the lowest mean nats a token, each ending after a space, as llm.c and
            build-nanogpt score it (hellaswag.py: acc_norm); "accuracy" goes by the sum (acc). Chance is 25%.
            124M of OpenAI: 29.55% and 28.59% there.
LAMBADA     OpenAI's lambada_test.jsonl: {"text": "…"} a line. What is left of the last space is the context, that
            space and the word after it are to be predicted: right when each of its tokens is the likeliest; perplexity
            is exp of the mean nats a *word* (EleutherAI's lm-evaluation-harness, task lambada_openai).
a text      Every token once, after as many before it as fit: windows of n_ctx tokens that begin `stride` apart, of
            which the last `stride` are scored. The first token comes after end-of-text. A smaller stride gives each
            token more context, a lower perplexity and more work (huggingface.co/docs/transformers/perplexity).
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workload.device import autocast
from workload.errors import WorkloadError
from workload.model import GPT2
from workload.tokenizer import Tokenizer

TOKENS_AT_ONCE = 8192  # in a batch, padding included
LOGITS_AT_ONCE = 1024  # places whose logits are held: 200 MB of fp32 with GPT-2's vocabulary
Progress = Callable[[int, int], None]  # (done, of how many)


@dataclass(frozen=True)
class Span:
    """Tokens of which the last `scored` are predicted from those before them."""

    tokens: Sequence[int]
    scored: int


@dataclass(frozen=True)
class SpanScore:
    nats: float  # of the scored tokens together
    greedy: bool  # each of them is the likeliest at its place


@dataclass(frozen=True)
class Choice:
    """A line of HellaSwag."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class HellaSwagScore:
    examples: int
    accuracy_norm: float  # by nats a token
    accuracy: float  # by nats


@dataclass(frozen=True)
class LambadaScore:
    examples: int
    accuracy: float
    perplexity: float  # a word


@dataclass(frozen=True)
class TextScore:
    tokens: int
    bytes: int
    stride: int
    nats_per_token: float
    perplexity: float  # a token
    bits_per_byte: float


def load_hellaswag(path: Path, limit: int = 0) -> list[Choice]:
    """The first `limit` lines, 0: all. Raises WorkloadError with the number of a line that is not one of HellaSwag's."""
    found = []
    for number, row in _load_lines(path, limit):
        context, endings, label = row.get("ctx"), row.get("endings"), row.get("label")
        if isinstance(label, str) and label.isdigit():  # as some copies have it
            label = int(label)
        if (
            not isinstance(context, str)
            or not isinstance(endings, list)
            or len(endings) < 2
            or not all(isinstance(ending, str) for ending in endings)
            or not isinstance(label, int)
            or isinstance(label, bool)
            or not 0 <= label < len(endings)
        ):
            raise _wrong(path, number, '{"ctx": text, "endings": [texts], "label": number of the right one}')
        found.append(Choice(context, tuple(endings), label))
    return found


def load_lambada(path: Path, limit: int = 0) -> list[str]:
    """The texts of the first `limit` lines, 0: all. Raises WorkloadError with the number of a line that has none."""
    found = []
    for number, row in _load_lines(path, limit):
        text = row.get("text")
        if not isinstance(text, str) or not all(part.strip() for part in text.rpartition(" ")[::2]):
            raise _wrong(path, number, '{"text": several words}')
        found.append(text)
    return found


def _load_lines(path: Path, limit: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of lines that are not empty."""
    seen = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if limit and seen == limit:
                    return
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise WorkloadError(f"{path}, line {number}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise _wrong(path, number, "an object")
                seen += 1
                yield number, row
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror}") from error
    if not seen:
        raise WorkloadError(f"{path}: nothing in it")


def _wrong(path: Path, number: int, expected: str) -> WorkloadError:
    return WorkloadError(
        f"{path}, line {number}: expected {expected}", "is it the published file of this task?"
    )


def score_hellaswag(
    model: GPT2,
    tokenizer: Tokenizer,
    choices: Sequence[Choice],
    *,
    dtype: torch.dtype,
    progress: Progress = lambda done, of: None,
) -> HellaSwagScore:
    spans = []
    for choice in choices:
        context = tokenizer.encode(choice.context) or [tokenizer.eot]
        for ending in choice.endings:
            tokens = tokenizer.encode(" " + ending)
            spans.append(Span([*context, *tokens], len(tokens)))
    scores = score_spans(model, spans, n_vocab=tokenizer.eot + 1, dtype=dtype, progress=progress)
    right = right_norm = first = 0
    for choice in choices:
        last = first + len(choice.endings)
        nats = [score.nats for score in scores[first:last]]
        means = [total / span.scored for total, span in zip(nats, spans[first:last], strict=True)]
        right += nats.index(min(nats)) == choice.label
        right_norm += means.index(min(means)) == choice.label
        first = last
    return HellaSwagScore(len(choices), right_norm / len(choices), right / len(choices))


def score_lambada(
    model: GPT2,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    dtype: torch.dtype,
    progress: Progress = lambda done, of: None,
) -> LambadaScore:
    spans = []
    for text in texts:
        context, _, word = text.rpartition(" ")
        target = tokenizer.encode(" " + word)
        spans.append(Span([*tokenizer.encode(context), *target], len(target)))
    scores = score_spans(model, spans, n_vocab=tokenizer.eot + 1, dtype=dtype, progress=progress)
    nats = sum(score.nats for score in scores) / len(scores)
    return LambadaScore(len(scores), sum(score.greedy for score in scores) / len(scores), _exp(nats))


def score_text(
    model: GPT2,
    tokenizer: Tokenizer,
    text: str,
    *,
    dtype: torch.dtype,
    stride: int = 0,
    progress: Progress = lambda done, of: None,
) -> TextScore:
    """stride: 1 … n_ctx tokens, 0: half of the context."""
    n_ctx = model.config.n_ctx
    stride = stride or max(1, n_ctx // 2)
    if not 1 <= stride <= n_ctx:
        raise WorkloadError(
            f"a stride of {stride} tokens, but it must be 1 … {n_ctx}, the context of this model"
        )
    n_bytes = len(text.encode("utf-8"))
    if not n_bytes:
        raise WorkloadError("the text is empty")
    tokens = [tokenizer.eot, *tokenizer.encode(text)]
    scores = score_spans(
        model, cut_windows(tokens, n_ctx, stride), n_vocab=tokenizer.eot + 1, dtype=dtype, progress=progress
    )
    nats, count = sum(score.nats for score in scores), len(tokens) - 1
    return TextScore(count, n_bytes, stride, nats / count, _exp(nats / count), nats / (math.log(2) * n_bytes))


def cut_windows(tokens: Sequence[int], n_ctx: int, stride: int) -> list[Span]:
    """Spans of at most n_ctx + 1 tokens that score each token but the first once, after at least n_ctx - stride others."""
    spans, done = [], 1
    while done < len(tokens):
        # The first window has no token before it to lean on, so it scores all of itself.
        end = min(len(tokens), done + (n_ctx if done == 1 else stride))
        spans.append(Span(tokens[max(0, end - n_ctx - 1) : end], end - done))
        done = end
    return spans


@torch.no_grad()
def score_spans(
    model: GPT2,
    spans: Sequence[Span],
    *,
    n_vocab: int,
    dtype: torch.dtype,
    progress: Progress = lambda done, of: None,
) -> list[SpanScore]:
    """A score for each span, in their order; the longest go first, with others of about their length.

    Of a span longer than the context the beginning is left out. Rows of the head from `n_vocab` on belong to no token.
    Raises WorkloadError when what is to be scored does not fit the context alone.
    """
    n_ctx = model.config.n_ctx
    longest = max((span.scored for span in spans), default=0)
    if longest > n_ctx:
        raise WorkloadError(
            f"{longest} tokens are to be scored together, but the context of this model is {n_ctx}",
            "a model with a larger n_ctx can be scored on this file",
        )
    rows = [list(span.tokens[-n_ctx - 1 :]) for span in spans]
    order = sorted(
        range(len(rows)), key=lambda i: len(rows[i]), reverse=True
    )  # what needs most memory fails first
    scores: list[SpanScore | None] = [None] * len(rows)
    device = model.wte.weight.device
    training = model.training
    model.eval()
    done = 0
    while done < len(order):
        width = len(rows[order[done]]) - 1
        batch = order[done : done + max(1, TOKENS_AT_ONCE // width)]
        # Padding comes after everything that is scored, where no token before it sees it.
        ids = torch.tensor([rows[i] + [0] * (width + 1 - len(rows[i])) for i in batch], device=device)
        # Where each scored token is predicted: (sequence, place of the token before it).
        places = [
            (b, t)
            for b, i in enumerate(batch)
            for t in range(len(rows[i]) - 1 - spans[i].scored, len(rows[i]) - 1)
        ]
        at = torch.tensor(places, device=device)
        with autocast(device, dtype):
            hidden = model.hidden(ids[:, :-1])[at[:, 0], at[:, 1]]
        nats, greedy = _score_places(model, hidden, ids[at[:, 0], at[:, 1] + 1], n_vocab, dtype)
        first = 0
        for i in batch:
            last = first + spans[i].scored
            scores[i] = SpanScore(math.fsum(nats[first:last]), all(greedy[first:last]))
            first = last
        done += len(batch)
        progress(done, len(order))
    model.train(training)
    return [score for score in scores if score is not None]


def _score_places(
    model: GPT2, hidden: Tensor, targets: Tensor, n_vocab: int, dtype: torch.dtype
) -> tuple[list[float], list[bool]]:
    """hidden (N, C), targets (N,) → nats of each target, and whether it is the likeliest; logits of a part at a time."""
    nats: list[float] = []
    greedy: list[bool] = []
    for x, y in zip(torch.split(hidden, LOGITS_AT_ONCE), torch.split(targets, LOGITS_AT_ONCE), strict=True):
        with autocast(hidden.device, dtype):
            logits = model.head(x)[:, :n_vocab].float()
        nats += torch.nn.functional.cross_entropy(logits, y, reduction="none").tolist()
        greedy += (logits.argmax(1) == y).tolist()
    return nats, greedy


def _exp(nats: float) -> float:
    """Perplexity; infinite where it is more than a float holds."""
    return math.exp(nats) if nats < 700 else math.inf
