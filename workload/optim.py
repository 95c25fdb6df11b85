"""AdamW with weight decay on matrices only, or Muon on the matrices of the blocks; their state by parameter name."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workload.config import TrainConfig
from workload.errors import WorkloadError

STATE = {"AdamW": ("exp_avg", "exp_avg_sq", "step"), "Muon": ("momentum_buffer",)}


class Muon(torch.optim.Muon):
    """torch's; on a CPU with its matrix products in fp32.

    torch has them in bf16, which most CPUs emulate at a small part of the speed, and the products of the demo's update
    would take longer than the rest of its step. The update is the same but for bf16's rounding.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.param_groups[0]["params"][0].device.type != "cpu":
            super().step(closure)  # type: ignore[no-untyped-call]
            return
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(
                    p.grad.lerp(mean, group["momentum"]), group["ns_coefficients"], group["ns_steps"]
                )
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, p.size(0) / p.size(1))))


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], turns: int) -> Tensor:
    """The nearest matrix whose singular values are about 1: Newton-Schulz turns of a quintic (Jordan et al. 2024)."""
    a, b, c = coefficients
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix  # the smaller side's products are fewer
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(turns):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.size(0) > matrix.size(1) else x


class Optimizers:
    """Optimizers that share the work: each parameter belongs to one of them.

    Every group has a `peak`, its learning rate as a multiple of the schedule's.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self._owners = {p: part for part in parts for group in part.param_groups for p in group["params"]}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def owner(self, parameter: Tensor) -> torch.optim.Optimizer:
        """The one of them that changes `parameter`."""
        return self._owners[parameter]

    def set_rate(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr * group["peak"]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)


def decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(decayed, not decayed) by name: matrices and embeddings, then biases and layer norms.

    Decay pulls towards 0, which is no neutral place for a layer norm's gain, and does nothing for a bias
    (as GPT-3 and its reproductions have it).
    """
    named = dict(model.named_parameters())
    decayed = {name: p for name, p in named.items() if p.dim() >= 2}
    return decayed, {name: p for name, p in named.items() if name not in decayed}


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of the blocks by name: neither embeddings nor a head of its own, whose rows are tokens."""
    return {name: p for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2}


def make_optimizer(model: nn.Module, train: TrainConfig) -> Optimizers:
    """As `train.optimizer` says. AdamW's update is fused into one pass over the weights on CPU and CUDA.

    Muon makes each matrix's mean gradient orthogonal, so that all its directions learn at one pace (Jordan et al.
    2024); the rate of a matrix of (out, in) is scaled by √max(1, out / in) as in its first publication, with which one
    rate serves all widths. Its weights decay as AdamW's do, in units of lr: in units of its own rate, which is some ten
    times larger, they would shrink faster than they learn.
    """
    decayed, kept = decay_groups(model)
    hidden = hidden_matrices(model) if train.optimizer == "muon" else {}
    adamw = torch.optim.AdamW(
        [
            {
                "params": [p for name, p in decayed.items() if name not in hidden],
                "weight_decay": train.weight_decay,
            },
            {"params": list(kept.values()), "weight_decay": 0.0},
        ],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=1e-8,
        fused=True,
    )
    for group in adamw.param_groups:
        group["peak"] = 1.0
    if not hidden:
        return Optimizers(adamw)
    muon = Muon(
        list(hidden.values()),
        lr=train.muon_lr,
        momentum=train.muon_momentum,
        weight_decay=train.weight_decay * train.lr / train.muon_lr,
    )
    muon.param_groups[0]["peak"] = train.muon_lr / train.lr
    return Optimizers(adamw, muon)


def gather_state(optimizer: Optimizers, model: nn.Module) -> dict[str, Tensor]:
    """``exp_avg/h.0.mlp.c_fc.weight`` … → tensor: independent of the order of groups. Empty before the first step."""
    state: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        owner = optimizer.owner(p)
        if p in owner.state:
            state |= {f"{key}/{name}": owner.state[p][key] for key in STATE[type(owner).__name__]}
    return state


def restore_state(optimizer: Optimizers, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """What `gather_state` gave, back into place, on each parameter's device.

    Nothing, as before the first step or with imported weights, leaves the optimizer as it is.
    """
    if not state:
        return
    for name, p in model.named_parameters():
        owner = optimizer.owner(p)
        mine = {key: state.get(f"{key}/{name}") for key in STATE[type(owner).__name__]}
        for key, tensor in mine.items():
            if tensor is None or (key != "step" and tensor.shape != p.shape):
                raise WorkloadError(
                    f"the checkpoint's optimizer state has no {key} for {name} of {tuple(p.shape)}"
                )
        owner.state[p] = {key: t.to(p.device, copy=True) for key, t in mine.items() if t is not None}


def state_bytes(model: nn.Module, train: TrainConfig) -> int:
    """Bytes of `gather_state` once there is one: AdamW keeps two numbers for every weight, Muon one; all fp32."""
    hidden = hidden_matrices(model) if train.optimizer == "muon" else {}
    return sum(
        4 * p.numel() * (1 if name in hidden else 2) + 4 * (name not in hidden)
        for name, p in model.named_parameters()
    )
