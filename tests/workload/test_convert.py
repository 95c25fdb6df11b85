"""Weights in from other programs and out to them, against those programs' own arithmetic."""

import dataclasses
import json
import math
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.workload.conftest import TINY
from workload import checkpoint
from workload.__main__ import main
from workload.checkpoint import Checkpoint, State
from workload.config import Config, DataConfig, ModelConfig, TrainConfig, list_presets, load_config
from workload.convert import export_model, import_model, measure, plan_parts
from workload.errors import WorkloadError
from workload.model import GPT2
from workload.tokenizer import load_tokenizer

BOOK = dataclasses.replace(TINY, tied=False, qkv_bias=False)


def make(config: ModelConfig = TINY, seed: int = 0) -> GPT2:
    """A model whose every weight counts: nothing is 0, 1 or small enough to be straight in every non-linearity."""
    torch.manual_seed(seed)
    model = GPT2(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def some_ids(config: ModelConfig = TINY, n_vocab: int = 257) -> Tensor:
    return torch.randint(0, n_vocab, (2, config.n_ctx), generator=torch.Generator().manual_seed(1))


def saved_of(model: GPT2, tokenizer: str = "bytes") -> Checkpoint:
    config = Config(model.config, DataConfig(tokenizer=tokenizer), TrainConfig())
    state = State(step=7, steps=9, sequences=0, best_val_loss=1.5, elapsed_s=0.0, metrics_bytes=0)
    return Checkpoint(config, state, {name: p.detach() for name, p in model.named_parameters()}, {}, {})


def loaded(out: Path) -> GPT2:
    """What a run made by `import_model` samples with; its checkpoint is verified."""
    saved = checkpoint.load(checkpoint.find(out))
    model = GPT2(saved.config.model)
    model.load_state_dict(saved.model)
    return model.eval()


def theirs(config: ModelConfig, seed: int = 0) -> Any:
    """The oracle: a GPT2LMHeadModel of random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, n_positions=config.n_ctx,
            vocab_size=config.vocab_size, tie_word_embeddings=config.tied, bos_token_id=256, eos_token_id=256,
            activation_function="gelu_new" if config.gelu_tanh else "gelu",
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def reload(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel.from_pretrained(folder, trust_remote_code=False).eval()


class BookAttention(nn.Module):
    """Chapter 3's: three projections, scores masked before the softmax, heads side by side."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.n_head
        self.W_query, self.W_key, self.W_value = (
            nn.Linear(config.n_embd, config.n_embd, bias=config.qkv_bias) for _ in range(3)
        )
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)
        self.register_buffer("mask", torch.triu(torch.ones(config.n_ctx, config.n_ctx), diagonal=1))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            w(x).reshape(B, T, self.heads, C // self.heads).transpose(1, 2)
            for w in (self.W_query, self.W_key, self.W_value)
        )
        assert isinstance(self.mask, Tensor)
        scores = (q @ k.mT).masked_fill(self.mask.bool()[:T, :T], -math.inf) / math.sqrt(C // self.heads)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))


class BookNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.scale * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + self.shift


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class BookForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, 4 * channels), TanhGELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class BookBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.att, self.ff = BookAttention(config), BookForward(config.n_embd)
        self.norm1, self.norm2 = BookNorm(config.n_embd), BookNorm(config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class BookModel(nn.Module):
    """The book's network, written for this test from its description: names and arithmetic are the format."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.n_ctx, config.n_embd)
        self.trf_blocks = nn.Sequential(*(BookBlock(config) for _ in range(config.n_layer)))
        self.final_norm = BookNorm(config.n_embd)
        self.out_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.size(1)))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


def book_model(config: ModelConfig) -> BookModel:
    torch.manual_seed(3)
    model = BookModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def nanogpt_checkpoint(
    oracle: Any, config: ModelConfig, *, bias: bool = True, before: str = ""
) -> dict[str, Any]:
    """What nanoGPT's train.py would have saved, had it trained the oracle."""
    model = {}
    for name, tensor in oracle.state_dict().items():
        matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        if bias or not name.endswith(".bias"):
            model[before + name] = tensor.T.contiguous() if matrix else tensor
    return {
        "model": model,
        "optimizer": {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1}]},
        "model_args": {
            "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "dropout": 0.0,
            "block_size": config.n_ctx, "vocab_size": config.vocab_size, "bias": bias,
        },
        "iter_num": 5,
        "best_val_loss": torch.tensor(3.25),
        "config": {"dataset": "openwebtext", "compile": True},
    }  # fmt: skip


def agree(mine: GPT2, other: Callable[[Tensor], Any], config: ModelConfig, n_vocab: int = 257) -> None:
    ids = some_ids(config, n_vocab)
    with torch.no_grad():
        expected = other(ids)
        expected = getattr(expected, "logits", expected)
        seen = mine(ids)[..., : expected.size(-1)]
    assert expected.std() > 0.3
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", list_presets())
def test_a_block_is_one_part_attention_to_two_parts_feed_forward(preset: str) -> None:
    model = load_config(preset).model
    shapes = measure(model)
    for layer in (0, model.n_layer - 1):
        for part, factor in (("attn", 4), ("mlp", 8)):
            matrices = [
                math.prod(shape)
                for name, shape in shapes.items()
                if name.startswith(f"h.{layer}.{part}.") and len(shape) == 2
            ]
            assert sum(matrices) == factor * model.n_embd**2


def test_a_padded_vocabulary_adds_rows_and_nothing_else() -> None:
    plain, padded = (measure(load_config("gpt2-124m", [f"vocab_size={v}"]).model) for v in (50257, 50304))
    assert padded.pop("wte.weight") == (50304, 768)
    assert plain.pop("wte.weight") == (50257, 768)
    assert plain == padded


@pytest.mark.parametrize(
    "config", [TINY, dataclasses.replace(TINY, tied=False), dataclasses.replace(TINY, gelu_tanh=False)]
)
def test_hugging_faces_model_is_imported_with_its_logits(tmp_path: Path, config: ModelConfig) -> None:
    oracle = theirs(config)
    oracle.save_pretrained(tmp_path / "hf")
    imported = import_model(tmp_path / "hf", tmp_path / "run")
    expected = dataclasses.replace(config, dropout=0.1)  # of their configuration
    assert (imported.kind, imported.config.model, imported.notes) == ("hf", expected, [])
    assert imported.config.data.tokenizer == "bytes"
    agree(loaded(tmp_path / "run"), oracle, config)


def test_hugging_faces_model_comes_in_shards_in_one_file_and_in_half_precision(tmp_path: Path) -> None:
    oracle = theirs(TINY)
    oracle.save_pretrained(tmp_path / "shards", max_shard_size="12KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    import_model(tmp_path / "shards", tmp_path / "one")
    agree(loaded(tmp_path / "one"), oracle, TINY)

    # OpenAI's own file on the hub: no prefix, masks among the weights, and here nothing beside it
    bare = {
        name.removeprefix("transformer."): t
        for name, t in oracle.state_dict().items()
        if "lm_head" not in name
    }
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    save_file({name: t.contiguous().clone() for name, t in bare.items()}, tmp_path / "gpt2.safetensors")
    imported = import_model(tmp_path / "gpt2.safetensors", tmp_path / "two", heads=2)
    assert imported.config.model == TINY
    agree(loaded(tmp_path / "two"), oracle, TINY)

    half = oracle.half()
    half.save_pretrained(tmp_path / "half")
    import_model(tmp_path / "half", tmp_path / "three")
    assert {p.dtype for p in checkpoint.load(checkpoint.find(tmp_path / "three")).model.values()} == {
        torch.float32
    }
    agree(loaded(tmp_path / "three"), half.float(), TINY)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": False}, {"qkv_bias": False}, {"gelu_tanh": False}, {"vocab_size": 384, "tied": False}],
    ids=str,
)
def test_an_export_loads_in_transformers_with_my_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **changes)
    mine = make(config)
    export_model(saved_of(mine), "hf", tmp_path / "hf")
    oracle = reload(tmp_path / "hf")
    assert oracle.config.vocab_size == 257
    assert oracle.lm_head.weight.shape == (257, 16)
    assert (oracle.lm_head.weight is oracle.transformer.wte.weight) == config.tied
    agree(mine, oracle, config)
    greedy = oracle.generate(some_ids()[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=256)
    assert greedy.shape == (1, 8)
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not config.tied)  # noqa: SIM118


def test_an_export_of_gpt2s_tokens_brings_the_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, n_embd=2, n_head=1, vocab_size=50304)
    mine = make(config)
    export_model(saved_of(mine, "gpt2"), "hf", tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    text = "To be, or not to be:  né 🎲\n\tthat's the 42nd question"
    assert tokenizer(text)["input_ids"] == load_tokenizer("gpt2").encode(text)
    assert tokenizer("<|endoftext|>")["input_ids"] == [50256]
    assert len(tokenizer) == 50257
    agree(mine, reload(tmp_path / "hf"), config, 50257)


@pytest.mark.parametrize("before", ["", "_orig_mod.", "module._orig_mod."])
def test_nanogpts_checkpoint_is_imported_with_its_logits(tmp_path: Path, before: str) -> None:
    """nanoGPT's network is GPT-2 with the exact GELU, which transformers computes, too."""
    config = dataclasses.replace(TINY, gelu_tanh=False)
    oracle = theirs(config)
    torch.save(nanogpt_checkpoint(oracle, config, before=before), tmp_path / "ckpt.pt")
    imported = import_model(tmp_path, tmp_path / "run")  # nanoGPT's out_dir
    assert (imported.kind, imported.config.model, imported.notes) == ("nanogpt", config, [])
    agree(loaded(tmp_path / "run"), oracle, config)
    assert "lm_head.weight" not in checkpoint.load(checkpoint.find(tmp_path / "run")).model


def test_nanogpt_without_biases_is_the_same_function_with_zeros(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, gelu_tanh=False)
    oracle = theirs(config)
    with torch.no_grad():
        for name, p in oracle.named_parameters():
            if name.endswith(".bias"):
                p.zero_()
    torch.save(nanogpt_checkpoint(oracle, config, bias=False), tmp_path / "ckpt.pt")
    imported = import_model(tmp_path / "ckpt.pt", tmp_path / "run")
    assert imported.config.model == dataclasses.replace(config, qkv_bias=False)
    agree(loaded(tmp_path / "run"), oracle, config)


def test_an_export_to_nanogpt_is_what_its_code_expects(tmp_path: Path) -> None:
    mine = make(dataclasses.replace(TINY, n_embd=64, vocab_size=384))
    notes = export_model(saved_of(mine), "nanogpt", tmp_path / "ckpt.pt")
    assert notes == [
        "its code computes the exact GELU, this model the tanh one: each differs by up to 0.0005"
    ]
    x = torch.linspace(-6, 6, 10001).double()
    assert 4e-4 < (nn.functional.gelu(x) - nn.functional.gelu(x, approximate="tanh")).abs().max() < 5e-4
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert content["model_args"] == {
        "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 16, "vocab_size": 257, "dropout": 0.0, "bias": True,
    }  # fmt: skip
    assert (content["iter_num"], content["best_val_loss"]) == (7, 1.5)
    groups = [len(group["params"]) for group in content["optimizer"]["param_groups"]]
    assert groups == [2 + 4 * 2, 2 + 8 * 2]  # as nanoGPT makes them: matrices, then biases and layer norms
    assert content["optimizer"]["state"] == {}
    state = content["model"]
    expected = {f"transformer.{name}" for name in measure(TINY)} | {"lm_head.weight"}
    assert state.keys() == expected
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    numbers = sum(t.numel() for name, t in state.items() if name != "lm_head.weight")
    assert (
        tmp_path / "ckpt.pt"
    ).stat().st_size < 4 * numbers + 20_000  # stored once, and without the padding
    assert torch.equal(state["transformer.h.1.mlp.c_fc.weight"], mine.h[1].mlp.c_fc.weight)
    agree_with = theirs(dataclasses.replace(TINY, n_embd=64))
    agree_with.load_state_dict(
        {
            n: t.T if n.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else t
            for n, t in state.items()
        }
    )
    agree(mine, agree_with, TINY)


def test_an_untied_head_has_no_place_in_nanogpt(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="nanoGPT has one matrix for token embedding and output head"):
        export_model(saved_of(make(BOOK)), "nanogpt", tmp_path / "ckpt.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_the_books_model_is_imported_with_its_logits(tmp_path: Path, qkv_bias: bool) -> None:
    config = dataclasses.replace(BOOK, qkv_bias=qkv_bias)
    model = book_model(config)
    save_file(model.state_dict(), tmp_path / "book.safetensors")
    imported = import_model(tmp_path / "book.safetensors", tmp_path / "run", heads=2)
    assert (imported.kind, imported.config.model, imported.notes) == ("book", config, [])
    agree(loaded(tmp_path / "run"), model, config)


def test_the_books_model_comes_in_a_torch_file_out_of_distributed_training(tmp_path: Path) -> None:
    model = book_model(BOOK)
    state = {f"module.{name}": t for name, t in model.state_dict().items() if not name.endswith(".mask")}
    torch.save({"model_state_dict": state, "optimizer_state_dict": {"state": {}}}, tmp_path / "model.pth")
    import_model(tmp_path / "model.pth", tmp_path / "run", heads=2)
    agree(loaded(tmp_path / "run"), model, BOOK)


def test_the_books_head_that_is_the_embedding_becomes_tied(tmp_path: Path) -> None:
    model = book_model(BOOK)
    with torch.no_grad():
        model.out_head.weight.copy_(model.tok_emb.weight)
    save_file(model.state_dict(), tmp_path / "book.safetensors")
    assert import_model(tmp_path / "book.safetensors", tmp_path / "run", heads=2).config.model.tied
    assert "lm_head.weight" not in checkpoint.load(checkpoint.find(tmp_path / "run")).model
    agree(loaded(tmp_path / "run"), model, BOOK)


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"qkv_bias": False, "vocab_size": 320}], ids=str)
def test_an_export_loads_in_the_books_model_with_my_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **changes)
    mine = make(config)
    assert export_model(saved_of(mine), "book", tmp_path / "book.safetensors") == []
    model = BookModel(dataclasses.replace(config, vocab_size=257)).eval()
    masks = {name: t.clone() for name, t in model.state_dict().items() if name.endswith(".mask")}
    model.load_state_dict(load_file(tmp_path / "book.safetensors"))  # strict
    assert all(torch.equal(t, masks[name]) for name, t in model.state_dict().items() if name in masks)
    agree(mine, model, config)


configs = st.builds(
    lambda heads, width, **rest: ModelConfig(n_head=heads, n_embd=heads * width, **rest),
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 4, 6]),
    n_layer=st.integers(1, 3),
    n_ctx=st.integers(1, 9),
    vocab_size=st.just(257),
    dropout=st.sampled_from([0.0, 0.25]),
    tied=st.booleans(),
    qkv_bias=st.booleans(),
    gelu_tanh=st.booleans(),
    init_std=st.sampled_from([0.02, 0.0625]),
)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs, kind=st.sampled_from(["hf", "nanogpt", "book"]), seed=st.integers(0, 99))
def test_out_and_in_again_is_the_same_model(
    tmp_path: Path, config: ModelConfig, kind: str, seed: int
) -> None:
    if kind == "nanogpt":
        config = dataclasses.replace(config, tied=True)
    mine = make(config, seed)
    for name in ("there", "back"):
        for path in (tmp_path / name,):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    export_model(saved_of(mine), kind, tmp_path / "there")
    imported = import_model(tmp_path / "there", tmp_path / "back")
    assert (imported.kind, imported.config.model, imported.notes) == (kind, config, [])
    saved = checkpoint.load(checkpoint.find(tmp_path / "back"))
    assert saved.config == imported.config
    assert saved.model.keys() == dict(mine.named_parameters()).keys()
    assert all(torch.equal(saved.model[name], p) for name, p in mine.named_parameters())


@given(configs, st.sampled_from(["hf", "nanogpt", "book"]))
@settings(deadline=None, max_examples=10)
def test_every_number_has_one_place_in_a_file(config: ModelConfig, kind: str) -> None:
    parts = plan_parts(config, kind)
    assert len({part.theirs for part in parts}) == len(parts)
    assert {part.ours for part in parts} == measure(config).keys()
    places = [(part.ours, part.third) for part in parts]
    assert len(set(places)) == len(places)
    assert all({(ours, t) for t in range(3)} <= set(places) for ours, third in places if third is not None)


def test_a_vocabulary_with_padding_comes_in_whole_and_goes_out_without(tmp_path: Path) -> None:
    mine = make(dataclasses.replace(TINY, n_embd=2, n_head=1, vocab_size=50304))
    content = {"model": {f"transformer.{n}": p.detach() for n, p in mine.named_parameters()}}
    args = {"n_layer": 2, "n_head": 1, "n_embd": 2, "block_size": 16, "vocab_size": 50304, "bias": True}
    torch.save(content | {"model_args": args}, tmp_path / "ckpt.pt")
    imported = import_model(tmp_path / "ckpt.pt", tmp_path / "run")
    assert (imported.config.model.vocab_size, imported.config.data.tokenizer) == (50304, "gpt2")
    assert imported.notes == ["the last 47 rows of the vocabulary are no tokens of gpt2: taken as padding"]
    export_model(checkpoint.load(checkpoint.find(tmp_path / "run")), "book", tmp_path / "b.safetensors")
    tensors = load_file(tmp_path / "b.safetensors")
    assert tensors["tok_emb.weight"].shape == tensors["out_head.weight"].shape == (50257, 2)


def test_heads_are_assumed_as_in_gpt2_and_said(tmp_path: Path) -> None:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=128, n_ctx=4, vocab_size=257, tied=False)
    save_file(book_model(config).state_dict(), tmp_path / "book.safetensors")
    imported = import_model(tmp_path / "book.safetensors", tmp_path / "run")
    assert imported.config.model.n_head == 2
    assert "2 heads are assumed" in imported.notes[0]


def test_what_was_imported_is_sampled_trained_on_and_exported_by_the_commands(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, run = make(), tmp_path / "run"
    export_model(saved_of(mine), "hf", tmp_path / "hf")
    settings = [
        "steps=1",
        "batch=2",
        "micro_batch=2",
        "lr=1e-9",
        "warmup=0",
        "eval_sequences=2",
        "sample_tokens=4",
    ]
    wanted = ["--set", *settings, f"source={text}"]
    assert main(["import", str(tmp_path / "hf"), "--out", str(run), *wanted]) == 0
    shown = capsys.readouterr().out
    assert f"{sum(p.numel() for p in mine.parameters()):,} parameters" in shown
    assert f"python -m workload sample {run}\n" in shown
    assert f"python -m workload train --resume --out {run}    (on {text};" in shown
    assert main(["sample", str(run), "--prompt", "3 times", "--tokens", "5", "--threads", "1"]) == 0
    assert capsys.readouterr().out.startswith("3 times")
    # goes on from these weights: with this learning rate one step leaves them where they are
    assert main(["train", "--resume", "--out", str(run), "--threads", "1", "--dtype", "fp32"]) == 0
    assert "trained 1 steps" in capsys.readouterr().out
    trained = checkpoint.load(checkpoint.find(run, "1"))
    for name, p in mine.named_parameters():
        torch.testing.assert_close(trained.model[name], p.detach(), rtol=0, atol=1e-6)
    for kind, name in (("hf", "folder"), ("nanogpt", "ckpt.pt"), ("book", "b.safetensors")):
        command = ["export", str(run), "--checkpoint", "1", "--to", kind, "--out", str(tmp_path / name)]
        assert main(command) == 0
        assert f"step 1 of {run} as {kind}: {tmp_path / name}\n" in capsys.readouterr().out
        assert (tmp_path / name).stat().st_mode & 0o444 == 0o444
    agree(mine, reload(tmp_path / "folder"), TINY)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("sprung",))


def _hf(folder: Path, **changes: object) -> Path:
    export_model(saved_of(make()), "hf", folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def _tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    file = _hf(folder) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


def _cut(file: Path, keep: float) -> Path:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    return file


def _pt(file: Path, content: object) -> Path:
    torch.save(content, file)
    return file


def _bytes(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def _run(folder: Path) -> Path:
    export_model(saved_of(make()), "hf", folder / "hf")
    import_model(folder / "hf", folder / "run")
    return folder / "run"


C_FC = "transformer.h.1.mlp.c_fc.weight"
NANO = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 257, "bias": True}
ERRORS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda f: f / "nowhere", "there is no such file or folder"),
    "an empty folder": (lambda f: f, "a folder without model.safetensors or"),
    "a run": (_run, "is a run or a checkpoint already\npython -m workload sample"),
    "an empty file": (lambda f: _bytes(f / "x.pt", b""), "0 bytes that are neither safetensors nor"),
    "a text": (lambda f: _bytes(f / "x.pt", b"To be, or not to be"), "19 bytes that are neither"),
    "half a safetensors": (lambda f: _cut(_hf(f / "hf") / "model.safetensors", 0.5), "model.safetensors: not whole"),
    "its header cut": (lambda f: _cut(_hf(f / "hf") / "model.safetensors", 0.01), "model.safetensors: not whole"),
    "half a ckpt.pt": (lambda f: _cut(_pt(f / "c.pt", {"model": {"h.0.x": torch.ones(999)}}), 0.5), "c.pt: not whole, or"),
    "a pickle": (lambda f: _bytes(f / "c.pt", pickle.dumps(Trap())), "not whole, or it holds more than tensors"),
    "code in a ckpt.pt": (lambda f: _pt(f / "c.pt", {"model": {}, "x": Trap()}), "which would be code to run"),
    "one tensor": (lambda f: _pt(f / "c.pt", torch.ones(2)), "it holds one Tensor, not tensors by name"),
    "not a tensor": (lambda f: _pt(f / "c.pt", {"model": {"h.0.x": 3}}), "h.0.x is no tensor but a int"),
    "another network": (lambda f: _pt(f / "c.pt", {"layers.0.wq": torch.ones(2)}), "1 tensors, layers.0.wq …: not a GPT-2"),
    "no tensors": (lambda f: _pt(f / "c.pt", {"model": {}, "model_args": NANO}), "no tensors: not a GPT-2"),
    "twice": (lambda f: _pt(f / "c.pt", {"h.0.x": torch.ones(1), "module.h.0.x": torch.ones(1)}), "h.0.x is in it twice"),
    "model_args": (lambda f: _pt(f / "c.pt", {"model": {}, "model_args": {**NANO, "n_head": "2"}}), "n_head is '2', which is no int"),
    "no embedding": (lambda f: _tensors(f / "hf", lambda t: t.pop("transformer.wte.weight")), "wte.weight is missing; expected"),
    "a block": (
        lambda f: _tensors(
            f / "hf",
            lambda t: t.update({k.replace(".1.", ".999999999999."): t.pop(k) for k in [*t] if ".h.1." in k}),
        ),
        "2 blocks, but one has the number 999999999999: some are missing",
    ),
    "missing": (lambda f: _tensors(f / "hf", lambda t: t.pop(C_FC)), "1 missing: h.1.mlp.c_fc.weight"),
    "extra": (lambda f: _tensors(f / "hf", lambda t: t.update({"score.weight": torch.ones(2)})), "1 not known in such a model: score.weight"),
    "shape": (lambda f: _tensors(f / "hf", lambda t: t.update({C_FC: torch.ones(4, 16)})), "h.1.mlp.c_fc.weight is (4, 16), expected (16, 64)"),
    "whole numbers": (lambda f: _tensors(f / "hf", lambda t: t.update({C_FC: torch.ones(16, 64, dtype=torch.int8)})), "is torch.int8, torch.strided, on cpu; weights are plain fractions"),
    "not finite": (lambda f: _tensors(f / "hf", lambda t: t.update({C_FC: torch.full((16, 64), math.nan)})), "h.1.mlp.c_fc.weight has numbers that are not finite"),
    "layers": (lambda f: _hf(f / "hf", n_layer=3), "n_layer is 3 by its own word, 2 by its tensors"),
    "many layers": (lambda f: _hf(f / "hf", n_layer=10**12), "2 by its tensors"),
    "heads": (lambda f: _hf(f / "hf", n_head=3), "model.n_embd = 16 is not a multiple of model.n_head = 3"),
    "no heads": (lambda f: _hf(f / "hf", n_head=None), "does not say how many attention heads"),
    "config.json": (lambda f: _hf(f / "hf", model_type="gpt_neo", layer_norm_epsilon=1e-6), "model_type is 'gpt_neo'; a GPT-2 has 'gpt2'"),
    "vocabulary": (lambda f: _tensors(_strip(f), lambda t: t.update({"transformer.wte.weight": torch.ones(65, 16)})), "a vocabulary of 65, which is none of the tokenizers"),
    "untied": (lambda f: _hf(f / "hf", tie_word_embeddings=False), "1 missing: lm_head.weight"),
}  # fmt: skip


def _strip(folder: Path) -> Path:
    """Where `_tensors` will put a folder without a config.json that knows better."""
    return folder / "hf"


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_no_whole_gpt2_is_one_readable_error_and_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, complaint = ERRORS[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    source = build(tmp_path / "in")
    if name == "vocabulary":
        document = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(document | {"vocab_size": 65}))
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(source), "--out", str(tmp_path / "out" / "run")]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert complaint in shown.err
    assert len(shown.err.splitlines()) >= 2  # what to do next
    assert "Traceback" not in shown.err
    assert list((tmp_path / "out").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]  # no trap was sprung


def test_nothing_that_exists_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main(["import", str(tmp_path / "hf"), "--out", str(run)]) == 1
    assert main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "hf")]) == 1
    assert capsys.readouterr().err.count("exists\nname another --out, or remove it first\n") == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "x"), "--heads", "4"]) == 1
    assert "2 heads by its own word, not 4" in capsys.readouterr().err
    below_a_file = str(tmp_path / "hf" / "config.json" / "x")
    for kind in ("hf", "nanogpt", "book"):
        assert main(["export", str(run), "--to", kind, "--out", below_a_file]) == 1
        assert "x could not be written" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), "--to", "hf", "--out", str(tmp_path / "x")]) == 1
    assert "there is no such folder" in capsys.readouterr().err


@contextmanager
def small_disk(most: int) -> Iterator[None]:
    """Files of this process may not grow past so many bytes, as on a disk that is full; pytest's own output neither."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["hf", "nanogpt", "book", "import"])
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path, kind: str) -> None:
    saved = saved_of(make())
    export_model(saved, "hf", tmp_path / "hf")
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "x"
    act = (
        (lambda: import_model(tmp_path / "hf", out))
        if kind == "import"
        else (lambda: export_model(saved, kind, out))
    )
    with small_disk(8192), pytest.raises(WorkloadError, match="could not be written") as caught:
        act()
    assert "make room" in caught.value.hint
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["hf", "nanogpt", "book"])
def test_a_crash_before_the_last_moment_leaves_nothing_under_the_name(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: object) -> None:
        raise Crash

    out = tmp_path / "x"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        patch.setattr("workload.convert._remove", lambda path: None)  # a power cut tidies nothing
        with pytest.raises(Crash):
            export_model(saved_of(make()), kind, out)
    assert [path.name for path in tmp_path.iterdir()] == [".x.partial"]
    export_model(saved_of(make()), kind, out)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    import_model(out, tmp_path / "run")


def test_a_checkpoint_that_is_not_of_its_configuration_is_not_exported(tmp_path: Path) -> None:
    saved = saved_of(make())
    del saved.model["h.1.mlp.c_fc.weight"]
    saved.model["ln_f.bias"] = torch.zeros(3)
    with pytest.raises(WorkloadError) as caught:
        export_model(saved, "hf", tmp_path / "x")
    assert "1 missing: h.1.mlp.c_fc.weight" in caught.value.message
    assert "ln_f.bias is (3,), expected (16,)" in caught.value.message
    assert list(tmp_path.iterdir()) == []
