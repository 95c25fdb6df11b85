"""AdamW with weight decay on matrices only, and its state by parameter name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from workload.config import TrainConfig
from workload.errors import WorkloadError

STATE = ("exp_avg", "exp_avg_sq", "step")


def decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(decayed, not decayed) by name: matrices and embeddings, then biases and layer norms.

    Decay pulls towards 0, which is no neutral place for a layer norm's gain, and does nothing for a bias
    (as GPT-3 and its reproductions have it).
    """
    named = dict(model.named_parameters())
    decayed = {name: p for name, p in named.items() if p.dim() >= 2}
    return decayed, {name: p for name, p in named.items() if name not in decayed}


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW, its update fused into one pass over the weights on CPU and CUDA."""
    decayed, kept = decay_groups(model)
    return torch.optim.AdamW(
        [
            {"params": list(decayed.values()), "weight_decay": train.weight_decay},
            {"params": list(kept.values()), "weight_decay": 0.0},
        ],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=1e-8,
        fused=True,
    )


def gather_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """``exp_avg/h.0.mlp.c_fc.weight`` … → tensor: independent of the order of groups. Empty before the first step."""
    return {
        f"{key}/{name}": optimizer.state[p][key]
        for name, p in model.named_parameters()
        if p in optimizer.state
        for key in STATE
    }


def restore_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """What `gather_state` gave, back into place, on each parameter's device.

    Nothing, as before the first step or with imported weights, leaves the optimizer as it is.
    """
    if not state:
        return
    for name, p in model.named_parameters():
        mine = {key: state.get(f"{key}/{name}") for key in STATE}
        for key, tensor in mine.items():
            if tensor is None or (key != "step" and tensor.shape != p.shape):
                raise WorkloadError(
                    f"the checkpoint's optimizer state has no {key} for {name} of {tuple(p.shape)}"
                )
        optimizer.state[p] = {key: t.to(p.device, copy=True) for key, t in mine.items() if t is not None}
