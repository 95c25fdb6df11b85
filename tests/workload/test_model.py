"""The network against an independent GPT-2, and against what must hold of it."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.workload.conftest import TINY
from workload.config import ModelConfig, load_config
from workload.model import GPT2, Cache, count_parameters, estimate_flops

CPU = torch.device("cpu")


def make(config: ModelConfig = TINY, seed: int = 0) -> GPT2:
    torch.manual_seed(seed)
    return GPT2(config).eval()


def some_ids(batch: int, length: int, config: ModelConfig = TINY) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def test_logits_loss_and_gradients_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(n_layer=3, n_head=4, n_embd=32, n_ctx=24, vocab_size=101)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=101,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    ).double()  # fmt: skip
    with torch.no_grad():  # larger than at initialisation, so that every non-linearity is used
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    mine = make(config).double()
    named = dict(theirs.transformer.named_parameters())
    assert named.keys() == dict(mine.named_parameters()).keys()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # OpenAI's matrices are (in, out)

    def as_mine(name: str, tensor: Tensor) -> Tensor:
        return tensor.T if name.endswith(conv1d) else tensor

    mine.load_state_dict({name: as_mine(name, p.detach()) for name, p in named.items()})
    ids = some_ids(2, 24, config)
    expected = theirs(ids, labels=ids)
    loss = mine.loss(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(mine(ids), expected.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        loss.double(), expected.loss.double(), rtol=1e-6, atol=1e-6
    )  # mine sums in fp32
    loss.backward()
    expected.loss.backward()
    for name, p in mine.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, as_mine(name, named[name].grad), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-355m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1558m", 1_557_611_200),
        ("book-163m", 163_009_536),
    ],
)
def test_parameter_counts_are_the_published_ones(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        model = GPT2(load_config(preset).model)
    assert count_parameters(model) == parameters


def test_attention_to_feed_forward_is_one_to_two() -> None:
    block = make().h[0]
    C = TINY.n_embd
    assert sum(p.numel() for p in block.attn.parameters() if p.dim() == 2) == 4 * C * C
    assert sum(p.numel() for p in block.mlp.parameters() if p.dim() == 2) == 8 * C * C


def test_flops_of_gpt2_small_are_those_of_the_literature() -> None:
    assert estimate_flops(load_config("gpt2-124m").model) == pytest.approx(8.55e8, rel=1e-3)
    # an untied head multiplies as often as a tied one, so only the missing biases differ
    difference = estimate_flops(load_config("gpt2-124m").model) - estimate_flops(
        load_config("book-163m").model
    )
    assert difference == 6 * 12 * 3 * 768


def test_the_loss_at_first_is_that_of_a_uniform_guess() -> None:
    config = dataclasses.replace(TINY, n_layer=4, n_embd=64, vocab_size=50257)
    ids = some_ids(4, 16, config)
    loss = make(config).loss(ids, ids.flip(0))
    assert loss.item() == pytest.approx(math.log(50257), abs=0.1)


def test_initial_weights_are_gpt2s() -> None:
    config = dataclasses.replace(TINY, n_layer=8, n_embd=64)
    model = make(config)
    block = model.h[3]
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert block.attn.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.wpe.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert bool((block.ln_1.weight == 1).all())


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_a_token_never_changes_logits_before_it(backend: SDPBackend) -> None:
    model, ids = make(), some_ids(2, 16)
    with torch.no_grad(), sdpa_kernel(backend):
        before = model(ids)
        for t in range(16):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % TINY.vocab_size
            after = model(changed)
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t:], after[:, t:])


def test_attention_backends_agree() -> None:
    model, ids = make(), some_ids(2, 16)
    logits = []
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with torch.no_grad(), sdpa_kernel(backend):
            logits.append(model(ids))
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize("cuts", [[16], [1] * 16, [5, 1, 1, 9], [3, 13]])
def test_the_cache_changes_nothing(cuts: list[int]) -> None:
    model, ids = make(), some_ids(2, 16)
    with torch.no_grad():
        whole = model(ids)
        cache = Cache(TINY, 2, device=CPU, dtype=torch.float32)
        parts = torch.cat([model(part, cache) for part in ids.split(cuts, dim=1)], dim=1)
    assert cache.length == 16
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_more_tokens_than_the_context_are_refused() -> None:
    model = make()
    with pytest.raises(ValueError, match="n_ctx is 16"):
        model(some_ids(1, 17))
    cache = Cache(TINY, 1, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        model(some_ids(1, 16), cache)
    with pytest.raises(ValueError, match="16 \\+ 1 tokens"):
        model(some_ids(1, 1), cache)


def test_a_tied_head_has_one_weight_and_options_change_what_they_say() -> None:
    names = set(make().state_dict())
    assert "lm_head.weight" not in names
    assert "h.0.attn.c_attn.bias" in names
    other = set(make(dataclasses.replace(TINY, tied=False, qkv_bias=False)).state_dict())
    assert other - names == {"lm_head.weight"}
    assert names - other == {"h.0.attn.c_attn.bias", "h.1.attn.c_attn.bias"}


def test_dropout_acts_in_training_only() -> None:
    model, ids = make(dataclasses.replace(TINY, dropout=0.5)), some_ids(1, 16)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_one_batch_is_learned_by_heart() -> None:
    """Below 0.05 nats a token of text that is random: a gradient that is wrong anywhere does not get there."""
    model = make(dataclasses.replace(TINY, n_embd=32)).train()
    ids = some_ids(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    loss = math.inf
    for _ in range(150):
        value = model.loss(ids[:, :-1], ids[:, 1:])
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        loss = value.item()
        if loss < 0.05:
            break
    assert loss < 0.05
