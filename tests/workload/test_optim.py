"""Which weights decay, and the optimizer's state by name."""

import dataclasses

import pytest
import torch

from tests.workload.conftest import TINY
from workload.config import ModelConfig, TrainConfig
from workload.errors import WorkloadError
from workload.model import GPT2
from workload.optim import (
    Muon,
    Optimizers,
    decay_groups,
    gather_state,
    hidden_matrices,
    make_optimizer,
    restore_state,
    state_bytes,
)

ADAMW = TrainConfig(lr=1e-2)
MUON = TrainConfig(lr=1e-2, optimizer="muon", muon_lr=0.05, muon_momentum=0.9, weight_decay=0.3)


def trained(config: ModelConfig = TINY, train: TrainConfig = ADAMW) -> tuple[GPT2, Optimizers]:
    torch.manual_seed(0)
    model = GPT2(config)
    optimizer = make_optimizer(model, train)
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


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = GPT2(dataclasses.replace(TINY, tied=False))
    hidden = hidden_matrices(model)
    assert set(hidden) == {
        f"h.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    optimizer = make_optimizer(model, MUON)
    adamw, muon = optimizer.parts
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, torch.optim.Muon)
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(p) for p in hidden.values()}
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())  # each once
    # by 0.3 · 1e-2 a step at the peak, whichever optimizer has them
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.3, 0.0, 0.06])
    assert muon.param_groups[0]["momentum"] == 0.9
    optimizer.set_rate(0.5e-2)  # halfway down from lr
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5e-2, 0.5e-2, 0.025])


def test_an_update_of_muon_moves_every_direction_alike() -> None:
    model, optimizer = trained(train=dataclasses.replace(MUON, weight_decay=0.0))
    weight = model.h[0].mlp.c_fc.weight
    before = weight.detach().clone()
    torch.manual_seed(1)
    optimizer.zero_grad()
    # a gradient whose directions differ by a factor of 1000
    u, v = (torch.linalg.qr(torch.randn(n, 16)).Q for n in (64, 16))
    weight.grad = u @ torch.diag(torch.logspace(-3, 0, 16)) @ v.T
    optimizer.parts[1].state.clear()  # no momentum of the first update
    optimizer.set_rate(1e-2)
    optimizer.step()
    moved = torch.linalg.svdvals(before - weight.detach())
    # Newton-Schulz leaves them between 0.7 and 1.2 where they are not tiny; times 0.05 · √(64 / 16)
    assert moved[:8].min() > 0.05 * 2 * 0.6
    assert moved.max() < 0.05 * 2 * 1.3


def test_muon_on_a_cpu_is_torchs_but_for_rounding() -> None:
    torch.manual_seed(2)
    start = [torch.randn(48, 16), torch.randn(16, 64), torch.randn(16, 16)]
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    weights = []
    for kind in (Muon, torch.optim.Muon):
        torch.manual_seed(3)
        mine = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = kind(mine, **options)
        for _ in range(4):
            for p in mine:
                p.grad = torch.randn_like(p)
            optimizer.step()
        weights.append([p.detach() for p in mine])
    for ours, theirs, before in zip(*weights, start, strict=True):
        far = (theirs - before).norm()
        assert (ours - theirs).norm() < 0.03 * far  # bf16 has two to three digits
        assert far > 0.3


@pytest.mark.parametrize("train", [ADAMW, MUON], ids=["adamw", "muon"])
def test_the_size_of_the_state_is_known_beforehand(train: TrainConfig) -> None:
    model, optimizer = trained(train=train)
    state = gather_state(optimizer, model)
    assert state_bytes(model, train) == sum(t.numel() * t.element_size() for t in state.values())


@pytest.mark.parametrize("train", [ADAMW, MUON], ids=["adamw", "muon"])
def test_state_goes_out_and_in_by_name(train: TrainConfig) -> None:
    model, optimizer = trained(train=train)
    state = gather_state(optimizer, model)
    expected = {"exp_avg", "exp_avg_sq", "step"} | ({"momentum_buffer"} if train is MUON else set())
    assert {key.partition("/")[0] for key in state} == expected
    assert ("exp_avg/h.0.mlp.c_fc.weight" in state) == (train is ADAMW)
    other = GPT2(TINY)
    other.load_state_dict(model.state_dict())
    fresh = make_optimizer(other, train)
    assert gather_state(fresh, other) == {}
    restore_state(fresh, other, state)
    for p in (*model.parameters(), *other.parameters()):
        p.grad = torch.ones_like(p)
    optimizer.step()
    fresh.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_of_another_optimizer_is_refused() -> None:
    model, optimizer = trained()
    with pytest.raises(WorkloadError, match=r"no momentum_buffer for h\.0\.attn\.c_attn\.weight"):
        restore_state(make_optimizer(model, MUON), model, gather_state(optimizer, model))


def test_state_of_another_model_is_refused() -> None:
    state = gather_state(*reversed(trained()))  # type: ignore[arg-type]
    wider = GPT2(dataclasses.replace(TINY, n_embd=32))
    with pytest.raises(WorkloadError, match=r"no exp_avg for wte\.weight of \(257, 32\)"):
        restore_state(make_optimizer(wider, TrainConfig()), wider, state)
    deeper = GPT2(dataclasses.replace(TINY, n_layer=3))
    with pytest.raises(WorkloadError, match=r"no exp_avg for h\.2"):
        restore_state(make_optimizer(deeper, TrainConfig()), deeper, state)
