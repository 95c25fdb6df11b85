"""AdamW with weight decay on matrices only, or Muon on the matrices of the blocks; their state by parameter name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workload.config import TrainConfig
from workload.errors import WorkloadError

STATE = {"AdamW": ("exp_avg", "exp_avg_sq", "step"), "Muon": ("momentum_buffer",)}


class Optimizers:
    """Optimizers that share the work: each parameter belongs to one of them.

    Every group has a `peak`, its learning rate as a multiple of the schedule's.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def owner(self, parameter: Tensor) -> torch.optim.Optimizer:
        """The one of them that changes `parameter`."""
        for part in self.parts:
            if any(p is parameter for group in part.param_groups for p in group["params"]):
                return part
        raise KeyError(f"no optimizer has this parameter of {tuple(parameter.shape)}")

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
    muon = torch.optim.Muon(
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
