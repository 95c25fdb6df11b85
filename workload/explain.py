"""One prompt on its way through a model: tokens, embeddings, attention, feed-forward, logits. For people who learn.

`trace` runs the model's own modules one after the other and keeps what goes in between; nothing is computed in
another way than in training, but for the attention weights, which the fused attention does not give away. They are
softmax(q·kᵀ / √D) with the future masked (Vaswani et al. 2017, section 3.2.1). `render_text` tells it in a terminal,
`render_page` draws it: one file, no script, nothing from a network.

B = 1 here, so shapes have no batch: T tokens, C channels, H heads of D = C / H channels, V vocabulary (model.py).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from workload.config import ModelConfig
from workload.errors import WorkloadError
from workload.files import replace_text
from workload.model import GPT2, Attention, Block, count_parameters
from workload.report import STYLE
from workload.tokenizer import Tokenizer

MOST_TOKENS = 24  # drawn, the last ones; the model sees all
MOST_CHANNELS = 48  # drawn of a vector, the first ones
MOST_GUESSES = 10  # next tokens shown
SHADES = " ·░▒▓█"


@dataclass(frozen=True)
class Layer:
    """What one block did. Lengths are Euclidean norms of the last token's vectors."""

    attention: Tensor  # (H, T, T): how much a token (row) takes from each token (column); rows sum to 1
    attention_adds: float  # length of what attention added to the last token's vector
    feed_forward_adds: float
    length: float  # of the last token's vector after both
    active: float  # share of the 4·C hidden numbers that are above 0, last token
    guess: int  # the likeliest next token, were this the last block
    guess_p: float  # its probability


@dataclass(frozen=True)
class Walk:
    """One prompt's way through a model, all on the CPU."""

    ids: list[int]
    token_vectors: Tensor  # (T, C), from wte
    position_vectors: Tensor  # (T, C), from wpe
    layers: list[Layer]
    output: Tensor  # (T, C), after ln_f: what the head reads
    logits: Tensor  # (V,), of the token after the last; without the rows of padding


@dataclass(frozen=True)
class Guess:
    token: int
    text: str
    p: float  # probability


@torch.no_grad()
def trace(model: GPT2, ids: Sequence[int], n_vocab: int) -> Walk:
    """Run `model` (in eval mode) on ids, 1 to n_ctx of them, block by block. n_vocab: rows that are tokens."""
    x = torch.tensor([list(ids)], device=model.wte.weight.device)
    places = torch.arange(x.size(1), device=x.device)
    token_vectors, position_vectors = model.wte(x), model.wpe(places)
    x = token_vectors + position_vectors
    layers = []
    for block in model.h:
        assert isinstance(block, Block)
        normed = block.ln_1(x)
        attended = block.attn(normed)
        x = x + attended
        fed_in = block.ln_2(x)
        hidden = F.gelu(block.mlp.c_fc(fed_in), approximate=block.mlp.approximate)
        fed = block.mlp(fed_in)
        x = x + fed
        p = model.head(model.ln_f(x[0, -1]))[:n_vocab].float().softmax(0)
        layers.append(
            Layer(
                attention=weigh(block.attn, normed[0]).cpu(),
                attention_adds=float(attended[0, -1].norm()),
                feed_forward_adds=float(fed[0, -1].norm()),
                length=float(x[0, -1].norm()),
                active=float((hidden[0, -1] > 0).float().mean()),
                guess=int(p.argmax()),
                guess_p=float(p.max()),
            )
        )
    output = model.ln_f(x)
    logits = model.head(output[0, -1])[:n_vocab]
    return Walk(
        ids=list(ids),
        token_vectors=token_vectors[0].cpu(),
        position_vectors=position_vectors.cpu(),
        layers=layers,
        output=output[0].cpu(),
        logits=logits.float().cpu(),
    )


def weigh(attention: Attention, x: Tensor) -> Tensor:
    """Attention weights (H, T, T) of x (T, C), the normed input of `attention`; 0 above the diagonal."""
    T, C = x.shape
    q, k, _ = attention.c_attn(x).view(T, 3, attention.n_head, -1).permute(1, 2, 0, 3)  # (H, T, D) each
    scores: Tensor = q @ k.mT / math.sqrt(C // attention.n_head)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def count_groups(model: GPT2) -> dict[str, int]:
    """Numbers that the model has learned or will, by what they are for; together `count_parameters`."""
    groups = {
        "token embedding": 0,
        "position embedding": 0,
        "attention, matrices": 0,
        "feed-forward, matrices": 0,
        "biases and layer norms": 0,
        "output head": 0,
    }
    for name, p in model.named_parameters():
        if p.dim() < 2:
            group = "biases and layer norms"
        elif name.startswith(("wte", "wpe", "lm_head")):
            group = {"t": "token embedding", "p": "position embedding", "m": "output head"}[name[1]]
        else:
            group = "attention, matrices" if ".attn." in name else "feed-forward, matrices"
        groups[group] += p.numel()
    return groups


def encode_prompt(text: str, tokenizer: Tokenizer, n_ctx: int) -> list[int]:
    """The tokens of `text`, end-of-text alone for none. Raises WorkloadError when they are more than n_ctx."""
    ids = tokenizer.encode(text) or [tokenizer.eot]
    if len(ids) > n_ctx:
        raise WorkloadError(
            f"the text is {len(ids)} {tokenizer.name} tokens long, and the model sees {n_ctx} at once",
            f"leave out {len(ids) - n_ctx} tokens or more, or name a --checkpoint with a longer context",
        )
    return ids


def name_token(tokenizer: Tokenizer, token: int) -> str:
    """A token as it is read, in quotes for its spaces; U+FFFD where it is a part of a character."""
    if token == tokenizer.eot:
        return "<|endoftext|>"
    text = tokenizer.to_bytes(token).decode("utf-8", errors="replace")
    return "'" + "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) + "'"


def rank_guesses(walk: Walk, tokenizer: Tokenizer) -> list[Guess]:
    """The likeliest next tokens, best first."""
    best = walk.logits.softmax(0).topk(min(MOST_GUESSES, walk.logits.numel()))
    return [
        Guess(token, name_token(tokenizer, token), p)
        for token, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def describe_head(weights: Tensor) -> str:
    """What a head (T, T) mostly looks at: the token itself, the one before or the first; mean over all but the first two."""
    T = weights.size(0)
    if T < 3:
        return ""
    rows = torch.arange(2, T)
    shares = {
        "itself": weights[rows, rows].mean(),
        "the token before": weights[rows, rows - 1].mean(),
        "the first token": weights[rows, 0].mean(),
    }
    name, share = max(shares.items(), key=lambda item: float(item[1]))
    return f"{name} {float(share):.0%}"


def render_text(walk: Walk, model: GPT2, tokenizer: Tokenizer, about: str) -> str:
    """The walk for a terminal. `about` says which model it is."""
    config, groups = model.config, count_groups(model)
    T, C, H, V = len(walk.ids), config.n_embd, config.n_head, walk.logits.numel()
    names = [name_token(tokenizer, token) for token in walk.ids]
    width = max(map(len, names[-MOST_TOKENS:]))
    matrices = 12 * C * C
    drawn = f", the last {MOST_TOKENS} shown" if T > MOST_TOKENS else ""
    lines = [
        f"model    {about}",
        f"         {count_parameters(model):,} parameters: {config.n_layer} blocks, {H} heads, {C} channels, "
        f"{config.n_ctx} tokens of context",
        "",
        f"1  Tokens: the text in pieces that have numbers        text -> (T,) = ({T},){drawn}",
        *(
            f"   {place:4}  {name:<{width}}  {token}"
            for place, (name, token) in _tail(enumerate(zip(names, walk.ids, strict=True)))
        ),
        "",
        f"2  Embeddings: a vector for each token, and one for its place        (T,) -> (T, C) = ({T}, {C})",
        f"   wte ({config.vocab_size}, {C}): {groups['token embedding']:,} parameters;   "
        f"wpe ({config.n_ctx}, {C}): {groups['position embedding']:,}",
        f"   lengths for {names[-1]}: token {walk.token_vectors[-1].norm():.2f}, place {walk.position_vectors[-1].norm():.2f}, "
        f"their sum {(walk.token_vectors[-1] + walk.position_vectors[-1]).norm():.2f}",
        "",
        f"3  Attention: each token gathers from itself and those before        ({T}, {C}) -> ({T}, {C})",
        f"   {H} heads of {C // H} channels; weights (H, T, T) = ({H}, {T}, {T}); 4·C² = {4 * C * C:,} parameters a block "
        f"{_biases(config.qkv_bias)}",
        f"   block 1, mean of its heads; rows take from columns, a shade for each fifth ({SHADES[1:]}):",
        *_shade(walk.layers[0].attention.mean(0), names, width),
        "   what the last token takes most from, mean of the heads:",
        *(
            f"   block {number:2}  {_most(layer.attention.mean(0)[-1], names)}"
            for number, layer in enumerate(walk.layers, 1)
        ),
        "",
        f"4  Feed-forward: each token's vector alone        ({T}, {C}) -> ({T}, {4 * C}) -> ({T}, {C})",
        f"   8·C² = {8 * C * C:,} parameters a block (+ biases {5 * C:,}): attention to feed-forward is 1 : 2, "
        f"{4 * C * C:,} and {8 * C * C:,} of {matrices:,}",
        f"   {'the last token':10}  attention adds  feed-forward adds  length after  active  next token, if this were the last block",
        *(
            f"   block {number:2}        {layer.attention_adds:14.2f}  {layer.feed_forward_adds:17.2f}  {layer.length:12.2f}"
            f"  {layer.active:6.0%}  {name_token(tokenizer, layer.guess)} {_percent(layer.guess_p)}"
            for number, layer in enumerate(walk.layers, 1)
        ),
        "",
        f"5  Logits: a score for each token of the vocabulary        ({C},) -> (V,) = ({V},)",
        f"   the head is {_head(config, groups)}; softmax turns scores into probabilities:",
        *(
            f"   {_percent(guess.p):>8}  {'#' * round(40 * guess.p):<2} {guess.text}"
            for guess in rank_guesses(walk, tokenizer)
        ),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _tail(items: Iterable[tuple[int, tuple[str, int]]]) -> list[tuple[int, tuple[str, int]]]:
    return list(items)[-MOST_TOKENS:]


def _percent(p: float) -> str:
    """Of a probability; more digits for those of a model that has learned nothing."""
    return f"{p:.1%}" if p >= 0.001 else f"{p:.4%}"


def _biases(qkv_bias: bool) -> str:
    return "(+ biases)" if qkv_bias else "(no bias for query, key and value)"


def _head(config: ModelConfig, groups: dict[str, int]) -> str:
    if config.tied:
        return f"the token embedding once more: no parameters of its own, {groups['token embedding']:,} used twice"
    return f"a matrix of its own ({config.vocab_size}, {config.n_embd}): {groups['output head']:,} parameters"


def _shade(weights: Tensor, names: Sequence[str], width: int) -> Iterator[str]:
    """A map of weights (T, T) in characters, its last MOST_TOKENS rows and columns."""
    first = max(0, len(names) - MOST_TOKENS)
    for row in range(first, len(names)):
        cells = "".join(
            SHADES[min(len(SHADES) - 1, math.ceil(float(weights[row, column]) * (len(SHADES) - 1)))] * 2
            for column in range(first, row + 1)
        )
        yield f"   {names[row]:>{width}} {cells}"


def _most(weights: Tensor, names: Sequence[str], most: int = 3) -> str:
    """``'a' 61%, 'b' 20% …``: where weights (T,) are largest."""
    best = weights.topk(min(most, len(names)))
    return ", ".join(
        f"{names[place]} {share:.0%}"
        for place, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )


PAGE_STYLE = """
.chips { display: flex; flex-wrap: wrap; gap: 6px } .chip { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 4px 10px; white-space: pre } .chip small { display: block; color: var(--soft) }
.maps { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-end; padding: 10px 0 }
.maps figure { padding: 8px 10px; max-width: 100% } text { fill: var(--ink); font-size: 11px } .grid { fill: none }
.plus { fill: var(--a) } .minus { fill: var(--b) } .box { fill: var(--faint); stroke: var(--a) }
th, td { padding-right: 14px } th + th { text-align: right } p { max-width: 78ch } code { font-size: 90% }
"""


def render_page(walk: Walk, model: GPT2, tokenizer: Tokenizer, about: str, text: str) -> str:
    """The walk as one page of HTML with its pictures in it."""
    config, groups = model.config, count_groups(model)
    T, C, H, V = len(walk.ids), config.n_embd, config.n_head, walk.logits.numel()
    names = [name_token(tokenizer, token) for token in walk.ids]
    shown = names[-MOST_TOKENS:]
    cut = f" The last {MOST_TOKENS} of {T} tokens are drawn." if T > MOST_TOKENS else ""
    vectors = walk.token_vectors + walk.position_vectors
    channels = min(C, MOST_CHANNELS)
    tiles = [
        (f"{count_parameters(model):,}", "parameters"),
        (f"{config.n_layer}", "blocks"),
        (f"{H} &times; {C // H}", "heads &times; channels of each"),
        (f"{C:,}", "channels of a token's vector"),
        (f"{T} of {config.n_ctx:,}", "tokens of context in use"),
    ]
    chips = "".join(
        f"<span class=chip>{escape(name)}<small>{token}</small></span>"
        for name, token in zip(shown, walk.ids[-MOST_TOKENS:], strict=True)
    )
    parts = [
        f"<h1>What a GPT-2 makes of a text</h1><div class=soft>{escape(about)}</div><pre>{escape(text)}</pre>",
        "<div class=tiles>"
        + "".join(f"<div class=tile><b>{value}</b><span>{what}</span></div>" for value, what in tiles)
        + "</div>",
        draw_flow(config, T, V),
        f"<h2>1 Tokens, ({T},)</h2><p>The text is cut into pieces, and each piece has a number.{cut}</p>"
        f"<div class=chips>{chips}</div>",
        f"<h2>2 Embeddings, ({T},) → ({T}, {C})</h2><p>The number picks a row of <code>wte</code> ({config.vocab_size:,} &times; {C}), "
        f"the place picks one of <code>wpe</code> ({config.n_ctx:,} &times; {C}); their sum is the token's vector. Drawn are its first "
        f"{channels} numbers: above 0 in one colour, below in the other.</p>"
        f"<div class=maps>{draw_vectors(vectors[-MOST_TOKENS:, :channels], shown, 'embeddings')}"
        f"{draw_vectors(walk.output[-MOST_TOKENS:, :channels], shown, 'after the last block, normed')}</div>",
        f"<h2>3 Attention, ({T}, {C}) → ({T}, {C})</h2><p>In each of {H} heads a token asks (query), the tokens up to it answer "
        f"(key), and it takes of their values in proportion: weights (H, T, T) = ({H}, {T}, {T}), each row sums to 1. Nothing is "
        f"taken from what comes later. Four matrices of C &times; C: 4·C² = {4 * C * C:,} parameters a block.</p>",
        *(_draw_layer(number, layer, names) for number, layer in enumerate(walk.layers, 1)),
        f"<h2>4 Feed-forward, ({T}, {C}) → ({T}, {4 * C}) → ({T}, {C})</h2><p>Each token's vector alone: four times as wide, "
        f"GELU, back. Two matrices of C &times; 4C: 8·C² = {8 * C * C:,} parameters a block, twice attention's.</p>{draw_ratio(C)}"
        "<p>What both add to the last token's vector, block by block, as lengths; and which token the head would name next if "
        "it read the vector there.</p>",
        _table(
            (
                "block",
                "attention adds",
                "feed-forward adds",
                "length after",
                "of 4·C above 0",
                "next token would be",
            ),
            [
                (
                    str(number),
                    f"{layer.attention_adds:.2f}",
                    f"{layer.feed_forward_adds:.2f}",
                    f"{layer.length:.2f}",
                    f"{layer.active:.0%}",
                    f"{name_token(tokenizer, layer.guess)} {_percent(layer.guess_p)}",
                )
                for number, layer in enumerate(walk.layers, 1)
            ],
        ),
        f"<h2>5 Logits, ({C},) → ({V},)</h2><p>The last vector times a row for each token gives its score; softmax makes "
        f"probabilities of them. The head is {escape(_head(config, groups))}.</p>{draw_guesses(rank_guesses(walk, tokenizer))}",
        "<h2>Parameters</h2>",
        _table(
            ("what", "numbers", "share"),
            [
                (group, f"{count:,}", f"{count / count_parameters(model):.1%}")
                for group, count in groups.items()
                if count
            ],
        ),
    ]
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>What a GPT-2 makes of a text</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{PAGE_STYLE}</style>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(cell)}' for cell in head)}{cells}</table>"


def _svg(width: float, height: float, label: str, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="width:{width:g}px;max-width:100%" role="img" '
        f'aria-label="{escape(label, quote=True)}">{content}</svg>'
    )


def draw_flow(config: ModelConfig, tokens: int, vocabulary: int) -> str:
    """The way from text to logits: boxes, and the shape between them."""
    C = config.n_embd
    stages = [
        ("tokens", f"({tokens},)"),
        ("wte + wpe", f"({tokens}, {C})"),
        ("attention", f"4·C² = {4 * C * C:,}"),
        ("feed-forward", f"8·C² = {8 * C * C:,}"),
        ("ln_f", f"({tokens}, {C})"),
        ("head", f"({tokens}, {vocabulary})"),
    ]
    step, width, top = 150, 122, 24
    content = [
        f'<rect class="grid" x="{2 * step - 8}" y="4" width="{2 * step - 12}" height="84" rx="8" stroke-dasharray="4 3"/>'
        f'<text x="{2 * step}" y="17">a block, {config.n_layer} times; each adds to the vector</text>'
    ]
    for i, (name, shape) in enumerate(stages):
        x = i * step
        content.append(
            f'<rect class="box" x="{x}" y="{top}" width="{width}" height="34" rx="6"/>'
            f'<text x="{x + width / 2}" y="{top + 21}" text-anchor="middle">{name}</text>'
            f'<text class="tick" x="{x + width / 2}" y="{top + 52}" text-anchor="middle">{shape}</text>'
        )
        if i:
            content.append(f'<text x="{x - 20}" y="{top + 21}">→</text>')
    return f"<figure>{_svg(len(stages) * step, 96, 'from tokens to logits', ''.join(content))}</figure>"


def draw_ratio(channels: int) -> str:
    """A block's matrices to scale: attention one part, feed-forward two."""
    whole, attention, feed_forward = 600, 4 * channels**2, 8 * channels**2
    left = whole * attention / (attention + feed_forward)
    content = (
        f'<rect class="plus" fill-opacity=".45" x="0" y="0" width="{left:g}" height="34"/>'
        f'<rect class="minus" fill-opacity=".45" x="{left:g}" y="0" width="{whole - left:g}" height="34"/>'
        f'<text x="8" y="21">attention 4·C² = {attention:,}</text>'
        f'<text x="{left + 8:g}" y="21">feed-forward 8·C² = {feed_forward:,}</text>'
    )
    return _svg(whole, 34, "attention to feed-forward, 1 to 2", content)


def _draw_layer(number: int, layer: Layer, names: Sequence[str]) -> str:
    """A block's attention: the mean of its heads with names, then each head small. The first block is open."""
    small = "".join(
        f"<figure><figcaption><b>head {head}</b> {describe_head(weights)}</figcaption>"
        f"{_draw_small(weights, f'block {number}, head {head}')}</figure>"
        for head, weights in enumerate(layer.attention, 1)
    )
    mean = layer.attention.mean(0)
    return (
        f"<details{' open' if number == 1 else ''}><summary>block {number}: the last token takes from "
        f"{escape(_most(mean[-1], names))}</summary><div class=maps>{draw_attention(mean, names, f'block {number}')}"
        f"{small}</div></details>"
    )


def draw_attention(weights: Tensor, names: Sequence[str], label: str) -> str:
    """A labelled map of weights (T, T): a row for each token, a cell for what it takes from each column's."""
    names = names[-MOST_TOKENS:]
    weights = weights[-len(names) :, -len(names) :]
    cell = 22
    left = 12 + 7 * max(map(len, names))
    content = []
    for row, name in enumerate(names):
        y = left + row * cell
        content.append(f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        place = f"{left + row * cell + 14} {left - 6}"
        content.append(f'<text transform="translate({place}) rotate(-90)" x="0" y="0">{escape(name)}</text>')
        for column, source in enumerate(names[: row + 1]):
            share = float(weights[row, column])
            tip = escape(f"{name} takes {share:.1%} from {source}")
            content.append(
                f'<rect class="plus" x="{left + column * cell}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                f'fill-opacity="{share:.2f}"><title>{tip}</title></rect>'
            )
    size = left + cell * len(names)
    return f"<figure><figcaption><b>mean of the heads</b></figcaption>{_svg(size, size, label, ''.join(content))}</figure>"


def _draw_small(weights: Tensor, label: str) -> str:
    count = min(MOST_TOKENS, weights.size(0))
    cells = weights[-count:, -count:]
    cell = max(5, 96 // count)
    return _svg(cell * count, cell * count, label, _cells(cells.tolist(), "plus", cell))


def draw_vectors(vectors: Tensor, names: Sequence[str], label: str) -> str:
    """Vectors (T, channels), a row each, scaled together so that the largest number is fully coloured."""
    scale = float(vectors.abs().max()) or 1.0
    left, cell = 12 + 7 * max(map(len, names)), 9
    rows = (vectors / scale).tolist()
    labels = "".join(
        f'<text x="{left - 6}" y="{row * cell + 8}" text-anchor="end" style="font-size:9px">{escape(name)}</text>'
        for row, name in enumerate(names)
    )
    content = labels + f'<g transform="translate({left} 0)">'
    content += _cells([[max(v, 0.0) for v in row] for row in rows], "plus", cell)
    content += _cells([[max(-v, 0.0) for v in row] for row in rows], "minus", cell) + "</g>"
    picture = _svg(left + cell * vectors.size(1), cell * len(names), label, content)
    return f"<figure><figcaption><b>{escape(label)}</b></figcaption>{picture}</figure>"


def _cells(rows: Sequence[Sequence[float]], style: str, size: int, levels: int = 10) -> str:
    """Squares as dark as their values, 0 to 1: one path a shade, because there are thousands of them."""
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if level := round(value * levels):
                paths.setdefault(level, []).append(f"M{x * size} {y * size}h{size}v{size}h-{size}z")
    return "".join(
        f'<path class="{style}" fill-opacity="{level / levels:g}" d="{"".join(squares)}"/>'
        for level, squares in sorted(paths.items())
    )


def draw_guesses(guesses: Sequence[Guess]) -> str:
    """Bars for the likeliest next tokens."""
    most = max(guess.p for guess in guesses) or 1.0
    content = "".join(
        f'<text x="150" y="{24 * row + 16}" text-anchor="end">{escape(guess.text)}</text>'
        f'<rect class="plus" x="160" y="{24 * row + 3}" width="{340 * guess.p / most:.1f}" height="18" fill-opacity=".6"/>'
        f'<text x="{166 + 340 * guess.p / most:.1f}" y="{24 * row + 16}">{_percent(guess.p)}</text>'
        for row, guess in enumerate(guesses)
    )
    return f"<figure>{_svg(580, 24 * len(guesses), 'likeliest next tokens', content)}</figure>"


def save_page(page: str, out: Path) -> None:
    """Write the page at once or not at all, over an older one."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, page, durable=False)
    except OSError as error:
        raise WorkloadError(f"{out} could not be written: {error}", "name another --out") from error
