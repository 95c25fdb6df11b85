"""Matrix products of the network: dense layers, and the loss of a large vocabulary without its logits.

Shapes
    N  rows, B·T tokens       C  channels in       K  channels out       V  vocabulary
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elements of the largest piece of logits that a loss holds at once: 256 MiB in fp32. Products are at full speed from
# about a thousand rows on (GPT-2's vocabulary: 1335 rows fit); larger pieces only take memory.
CHUNK_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}

# Rows of a padded head are a multiple of this. Products of 50257 columns, an odd number, leave the fast paths of MKL
# (1.3 times as long, measured) and of tensor cores (nanoGPT's 50304 is such a multiple).
PAD = 128


class Linear(nn.Linear):
    """nn.Linear by the product that is fastest on this processor; parameters, names and results are its own."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, C) → (…, K)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, C), weight (K, C), bias (K) → (…, K), as F.linear."""
    if not _takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
    return _one_row(x, weight, bias) if x.numel() == x.size(-1) else _onednn(x, weight, bias)


class _OneDNNLinear(torch.autograd.Function):
    """A dense layer whose forward product and whose gradient of x come from oneDNN, that of the weight from BLAS."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.size(0))
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _onednn(grad, weight.t(), None).view_as(x) if wants_x else None,
            grad.t() @ x.reshape(-1, x.size(-1)) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`_onednn` of a single row, as a batch of two products of one column each with half of the weight's rows.

    Generating a token reads every weight once. Both oneDNN's and MKL's own product of one row need 1.6 to 2 times as
    long as reading does; MKL's batched one is as fast as reading (measured on an EPYC with AVX-512).
    """
    column = x.reshape(1, -1).t()  # with strides (1, C): with (1, 1) the same call is 4 times slower
    half = len(weight) // 2
    y = torch.bmm(weight[: 2 * half].view(2, half, -1), column.expand(2, -1, 1)).view(-1)
    if len(weight) % 2:
        y = torch.cat([y, weight[-1] @ column])
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and prefers_onednn()
    )


@cache
def prefers_onednn() -> bool:
    """Whether fp32 products go to oneDNN: on AMD processors, where torch's own choice, MKL, takes slower code.

    Measured on an EPYC with AVX-512, two threads: 190 GFLOP/s against 140 in the layers of a model of 384 channels.
    Decided by the processor's name and not by its speed, so that a run computes the same bits every time.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    has_op = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_op and "AuthenticAMD" in text


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """F.cross_entropy(x @ weight.T, targets), in nats and fp32, without the logits of all rows at once.

    x (N, C), weight (V, C), targets (N) → one number ("mean") or (N) ("none", which has no gradient). Rows are taken
    in pieces of CHUNK_ELEMENTS, and what a piece gives to the gradients is computed while its logits are there, so
    the backward pass has only to scale it (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989). Products
    are in autocast's format where it is on; the softmax and the sums over pieces are in fp32.
    """
    if reduction == "mean":
        return _LinearCrossEntropy.apply(x, weight, targets)  # type: ignore[no-any-return,no-untyped-call]
    if reduction != "none":
        raise ValueError(f'reduction is "mean" or "none", not "{reduction}"')
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise ValueError('reduction "none" has no gradient: call it under torch.no_grad()')
    dtype = _product_dtype(x, weight)
    head, n_vocab = _pad(weight.to(dtype)), weight.size(0)
    pieces = [
        _softmax(linear(part.to(dtype), head, None), targets_part, n_vocab)[0]
        for part, targets_part in _pieces(x, targets, head.size(0))
    ]
    return torch.cat(pieces)


class _LinearCrossEntropy(torch.autograd.Function):
    """The mean of `linear_cross_entropy`, its gradients computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        dtype, n_vocab = _product_dtype(x, weight), weight.size(0)
        head = _pad(weight.to(dtype))
        # Sums over many rows of a frequent token could pass fp16's largest number, 65504.
        shrink = 1 / 64 if dtype == torch.float16 else 1.0
        total: Tensor | None = None
        grads_x: list[Tensor] = []
        grad_weight: Tensor | None = None
        for part, targets_part in _pieces(x, targets, head.size(0)):
            rows = part.to(dtype)
            losses, p = _softmax(linear(rows, head, None), targets_part, n_vocab)
            total = losses.sum() if total is None else total + losses.sum()
            if not (wants_x or wants_weight):
                continue
            # The derivative by the logits is p less 1 at the target. Left unscaled: divided by N it would be 0 in fp16.
            grad = p.scatter_add_(1, targets_part[:, None], p.new_full((len(rows), 1), -1.0)).to(dtype)
            if wants_x:
                grads_x.append((grad @ head).to(x.dtype))
            if wants_weight:
                if dtype == torch.float16:
                    rows = rows * shrink
                if grad_weight is None:
                    grad_weight = (grad.t() @ rows).to(p.dtype)
                elif dtype == p.dtype:
                    grad_weight.addmm_(grad.t(), rows)
                else:
                    grad_weight += grad.t() @ rows
        assert total is not None
        ctx.save_for_backward(
            torch.cat(grads_x) if wants_x else None,
            grad_weight[:n_vocab] if grad_weight is not None else None,
        )
        ctx.shrink, ctx.dtype, ctx.n = shrink, weight.dtype, x.size(0)
        return total / x.size(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        scale = grads[0] / ctx.n
        return (
            (grad_x * scale).to(grad_x.dtype) if grad_x is not None else None,
            (grad_weight * (scale / ctx.shrink)).to(ctx.dtype) if grad_weight is not None else None,
            None,
        )


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    return (
        torch.get_autocast_dtype(kind)
        if torch.is_autocast_enabled(kind)
        else torch.promote_types(x.dtype, weight.dtype)
    )


def _pad(head: Tensor) -> Tensor:
    """(V, C) → (V rounded up to PAD, C), zeros below; as it is where padding would cost more than 3 percent."""
    missing = -head.size(0) % PAD
    return F.pad(head, (0, 0, 0, missing)) if missing and head.size(0) >= 32 * PAD else head


def _pieces(x: Tensor, targets: Tensor, columns: int) -> list[tuple[Tensor, Tensor]]:
    """Rows of x and targets, in as few equal pieces as keep their logits within CHUNK_ELEMENTS."""
    elements = CHUNK_ELEMENTS.get(x.device.type, CHUNK_ELEMENTS["cpu"])
    count = math.ceil(x.size(0) * columns / elements)
    rows = math.ceil(x.size(0) / count)
    return list(zip(torch.split(x, rows), torch.split(targets, rows), strict=True))


def _softmax(logits: Tensor, targets: Tensor, n_vocab: int) -> tuple[Tensor, Tensor]:
    """logits (R, V padded), targets (R) → losses (R) and probabilities (R, V padded), at least in fp32.

    log Σ exp = largest logit - log(largest probability): no pass for a log-softmax and its exponential. On a CPU the
    probabilities take the place of the logits where they can: new pages for as many cost more than the softmax.
    """
    if logits.size(1) > n_vocab:
        logits[:, n_vocab:] = -math.inf
    dtype = torch.promote_types(logits.dtype, torch.float32)
    excess = logits.amax(1, keepdim=True).to(dtype) - logits.gather(1, targets[:, None]).to(dtype)
    if logits.device.type == "cpu" and logits.dtype == dtype:
        p = torch.softmax(logits, 1, out=logits)
    else:
        p = logits.softmax(1, dtype=dtype)
    return (excess - p.amax(1, keepdim=True).log()).squeeze(1), p
