"""Which weights decay, and the optimizer's state by name."""

import dataclasses

import pytest
import torch

from tests.workload.conftest import TINY
from workload.config import ModelConfig, TrainConfig
from workload.errors import WorkloadError
from workload.model import GPT2
from workload.optim import decay_groups, gather_state, make_optimizer, restore_state


def trained(config: ModelConfig = TINY) -> tuple[GPT2, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = GPT2(config)
    optimizer = make_optimizer(model, TrainConfig(lr=1e-2))
    model.loss(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    return model, optimizer


def test_matrices_and_embeddings_decay_and_nothing_else() -> None:
    model = GPT2(TINY)
    decayed, kept = decay_groups(model)
    assert decayed.keys() | kept.keys() == dict(model.named_parameters()).keys()
    assert not decayed.keys() & kept.keys()
    assert {"wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight"} <= decayed.keys()
    assert {"ln_f.weight", "ln_f.bias", "h.0.ln_1.weight", "h.0.attn.c_attn.bias"} <= kept.keys()
    assert all(name.endswith(".weight") and ".ln_" not in name for name in decayed)
    with_decay, without = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.3, 0.0)
    assert len(with_decay["params"]) == len(decayed)
    assert with_decay["betas"] == (0.9, 0.95)
    assert with_decay["fused"]


def test_state_goes_out_and_in_by_name() -> None:
    model, optimizer = trained()
    state = gather_state(optimizer, model)
    assert {key.partition("/")[0] for key in state} == {"exp_avg", "exp_avg_sq", "step"}
    other = GPT2(TINY)
    other.load_state_dict(model.state_dict())
    fresh = make_optimizer(other, TrainConfig(lr=1e-2))
    assert gather_state(fresh, other) == {}
    restore_state(fresh, other, state)
    for p in (*model.parameters(), *other.parameters()):
        p.grad = torch.ones_like(p)
    optimizer.step()
    fresh.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_of_another_model_is_refused() -> None:
    state = gather_state(*reversed(trained()))  # type: ignore[arg-type]
    wider = GPT2(dataclasses.replace(TINY, n_embd=32))
    with pytest.raises(WorkloadError, match=r"no exp_avg for wte\.weight of \(257, 32\)"):
        restore_state(make_optimizer(wider, TrainConfig()), wider, state)
    deeper = GPT2(dataclasses.replace(TINY, n_layer=3))
    with pytest.raises(WorkloadError, match=r"no exp_avg for h\.2"):
        restore_state(make_optimizer(deeper, TrainConfig()), deeper, state)
