"""GPT-2 as OpenAI built it, and as a plain module.

Learned positions, pre-norm blocks, tanh GELU, layer norm with eps 1e-5, an output head that is the token
embedding. Three options leave that: `tied = False` gives the head a matrix of its own, `qkv_bias = False` drops
three biases a block, `gelu_tanh = False` takes the exact GELU. Parameter names are OpenAI's (wte wpe h.N.attn.c_attn …),
matrices are torch's (out, in).

Shapes
    B  sequences in a batch            C  channels, n_embd              V  vocabulary, vocab_size
    T  tokens of a sequence, ≤ n_ctx   H  heads, n_head                 D  channels of a head, C / H
    P  tokens that the cache holds already (0 without a cache)

    ids (B, T) ─ wte + wpe ─► x (B, T, C) ─ n_layer blocks ─► ln_f ─► (B, T, C) ─ head ─► logits (B, T, V)
    block   x + attn(ln_1(x)),  then  x + mlp(ln_2(x))
    attn    C → 3C, split into q k v (B, H, T, D); scores (B, H, T, P + T); joined (B, T, C); C → C     4·C² weights
    mlp     C → 4C, GELU, 4C → C, each token alone                                                       8·C² weights
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workload.config import ModelConfig
from workload.products import Linear, linear, linear_cross_entropy


class Cache:
    """Keys and values of the tokens seen so far, so that generating one more token costs one more token.

    Room for `batch` sequences of n_ctx tokens; `length` of them are in use. For use under `torch.no_grad`.
    """

    def __init__(self, config: ModelConfig, batch: int, *, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layer, 2, batch, config.n_head, config.n_ctx, config.n_embd // config.n_head)
        self._store = torch.empty(shape, device=device, dtype=dtype)  # what is not written yet is never read
        self._config = config
        self.length = 0

    def repeat(self, batch: int) -> "Cache":
        """The tokens of this cache's only sequence, `batch` times."""
        copies = Cache(self._config, batch, device=self._store.device, dtype=self._store.dtype)
        copies.length = self.length
        copies._store[..., : self.length, :] = self._store[..., : self.length, :]
        return copies

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, T, D) after the tokens in use; returns all, (B, H, P + T, D)."""
        end = self.length + k.size(2)
        keys, values = self._store[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end].to(k.dtype), values[:, :, :end].to(v.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """x (B, T, C) → (B, T, C); a token sees itself and those before it."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        past = k.size(2) - T
        # is_causal masks from the upper left corner, which is right only without a past
        mask = (
            torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past) if past and T > 1 else None
        )
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=past == 0, dropout_p=self.dropout if self.training else 0.0
        )
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.approximate = "tanh" if config.gelu_tanh else "none"
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT2(nn.Module):
    """The whole network. Weights are drawn from torch's global generator: seed it first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # A tied head is no module at all: the weight has one name and is stored once.
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's: normal, init_std = 0.02 (positions half), residual projections by 1/√(2·n_layer); biases 0.

        Each block adds twice to the residual stream, so its variance would grow with depth otherwise
        (GPT-2 paper, section 2.3; the deviations are those of OpenAI's model.py).
        """
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif ".ln_" in name or name.startswith("ln_"):
                nn.init.ones_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer))
            else:
                nn.init.normal_(parameter, std=std / 2 if name == "wpe.weight" else std)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids (B, T) → logits (B, T, V). With a cache, ids are what follows the tokens in it, and are added to it."""
        return self.head(self.hidden(ids, cache))

    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids (B, T) → the vectors that the head reads, (B, T, C)."""
        past = cache.length if cache is not None else 0
        T = ids.size(1)
        if past + T > self.config.n_ctx:
            raise ValueError(f"{past} + {T} tokens, but n_ctx is {self.config.n_ctx}")
        x = self.wte(ids) + self.wpe(torch.arange(past, past + T, device=ids.device))
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)  # type: ignore[no-any-return]

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the head's own matrix, or the token embedding that it is tied to."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def head(self, x: Tensor) -> Tensor:
        """x (…, C) → logits (…, V)."""
        return linear(x, self.head_weight, None)

    def loss(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross entropy in nats of targets (B, T), each the token after its place in ids (B, T).

        reduction "mean" → one number; "none" → (B·T,), without a gradient. The logits never exist as a whole.
        """
        x = self.hidden(ids)
        return linear_cross_entropy(x.view(-1, x.size(-1)), self.head_weight, targets.reshape(-1), reduction)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def estimate_flops(config: ModelConfig) -> float:
    """Floating-point operations to train on one token: 6 for every weight that is multiplied, 12·C·T a layer of attention.

    Embeddings are looked up, not multiplied; a tied one is, as the head (PaLM, arXiv 2204.02311, appendix B).
    """
    with torch.device("meta"):
        model = GPT2(config)
    looked_up = model.wpe.weight.numel() + (0 if config.tied else model.wte.weight.numel())
    return 6.0 * (count_parameters(model) - looked_up) + 12.0 * config.n_layer * config.n_embd * config.n_ctx
