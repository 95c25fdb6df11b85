"""The walk through a model: the model's own numbers, told and drawn."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from tests.workload.conftest import TINY
from tests.workload.test_convert import make, reload, saved_of, some_ids
from tests.workload.test_report import parse
from workload.__main__ import main
from workload.config import ModelConfig
from workload.convert import export_model, import_model
from workload.errors import WorkloadError
from workload.explain import (
    MOST_TOKENS,
    count_groups,
    describe_head,
    draw_attention,
    encode_prompt,
    name_token,
    rank_guesses,
    render_page,
    render_text,
    trace,
)
from workload.model import GPT2, count_parameters
from workload.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
VARIANTS = [
    TINY,
    dataclasses.replace(TINY, tied=False, qkv_bias=False, vocab_size=384),
    dataclasses.replace(TINY, gelu_tanh=False, n_head=1, n_layer=1),
]


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_the_walk_ends_where_the_model_does(config: ModelConfig) -> None:
    model, ids = make(config), some_ids(config)[0]
    walk = trace(model, ids.tolist(), 257)
    with torch.no_grad():
        logits = model(ids[None])[0, -1, :257]
        torch.testing.assert_close(walk.output, model.hidden(ids[None])[0])
    torch.testing.assert_close(walk.logits, logits)
    assert len(walk.layers) == config.n_layer
    last = walk.layers[-1]  # the head after the last block is the model's own
    assert last.guess == int(logits.argmax())
    assert last.guess_p == pytest.approx(float(logits.softmax(0).max()), rel=1e-5)
    assert [guess.token for guess in rank_guesses(walk, BYTES)] == logits.topk(10).indices.tolist()
    torch.testing.assert_close(walk.token_vectors, model.wte(ids).detach())


def test_attention_weights_are_those_of_transformers(tmp_path: Path) -> None:
    model, ids = make(), some_ids()[0]
    export_model(saved_of(model), "hf", tmp_path / "hf")
    oracle = reload(tmp_path / "hf")
    oracle.set_attn_implementation("eager")  # the only one that gives its weights away
    with torch.no_grad():
        expected = oracle(ids[None], output_attentions=True, output_hidden_states=True)
    walk = trace(model, ids.tolist(), 257)
    for layer, weights in zip(walk.layers, expected.attentions, strict=True):
        torch.testing.assert_close(layer.attention, weights[0], rtol=1e-5, atol=1e-6)
        assert not layer.attention.triu(1).any()
        torch.testing.assert_close(layer.attention.sum(-1), torch.ones(2, 16))
    # hidden states: before each block, and what the head reads after the last
    assert walk.layers[0].length == pytest.approx(float(expected.hidden_states[1][0, -1].norm()), rel=1e-5)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_groups_of_parameters_are_all_of_them(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = GPT2(config)
    groups = count_groups(model)
    square = config.n_embd**2
    assert sum(groups.values()) == count_parameters(model)
    assert groups["attention, matrices"] == 4 * square * config.n_layer
    assert groups["feed-forward, matrices"] == 8 * square * config.n_layer
    assert groups["token embedding"] == config.vocab_size * config.n_embd
    assert groups["position embedding"] == config.n_ctx * config.n_embd
    assert groups["output head"] == (0 if config.tied else config.vocab_size * config.n_embd)


def test_what_the_feed_forward_adds_is_measured_where_it_is_added() -> None:
    model, ids = make(), some_ids()[0].tolist()
    with torch.no_grad():
        model.h[1].mlp.c_proj.weight.zero_()
        model.h[1].mlp.c_proj.bias.zero_()
        model.h[0].attn.c_proj.weight.zero_()
        model.h[0].attn.c_proj.bias.zero_()
        model.h[1].mlp.c_fc.weight.zero_()
        model.h[1].mlp.c_fc.bias.copy_(torch.tensor([1.0, -1.0, -1.0, -1.0]).repeat(16))
    first, second = trace(model, ids, 257).layers
    assert first.attention_adds == 0 < first.feed_forward_adds
    assert second.feed_forward_adds == 0 < second.attention_adds
    assert second.active == 0.25


def test_a_head_is_described_by_what_it_looks_at() -> None:
    itself = torch.eye(5)
    assert describe_head(itself) == "itself 100%"
    assert describe_head(itself[[0, 0, 1, 2, 3]]) == "the token before 100%"
    assert describe_head(itself[[0, 0, 0, 0, 0]]) == "the first token 100%"
    assert describe_head(itself[:2, :2]) == ""  # the token before is the first


def test_tokens_are_named_so_that_spaces_and_parts_show() -> None:
    pairs = load_tokenizer("gpt2")
    assert [name_token(pairs, token) for token in pairs.encode("a cat\n")] == ["'a'", "' cat'", "'\\n'"]
    assert name_token(BYTES, 0xC3) == "'\ufffd'"
    assert name_token(BYTES, 256) == name_token(pairs, 50256) == "<|endoftext|>"


def test_a_text_must_fit_and_may_be_empty() -> None:
    assert encode_prompt("abc", BYTES, 3) == [97, 98, 99]
    assert encode_prompt("", BYTES, 3) == [256]
    with pytest.raises(WorkloadError, match="5 bytes tokens long, and the model sees 3 at once") as caught:
        encode_prompt("abcde", BYTES, 3)
    assert "leave out 2 tokens" in caught.value.hint


def test_ids_that_are_no_token_are_never_guessed() -> None:
    model = make(dataclasses.replace(TINY, vocab_size=384, tied=False))
    assert model.lm_head is not None
    with torch.no_grad():
        model.lm_head.weight[257:] *= 1000
    walk = trace(model, [1, 2, 3], 257)
    assert walk.logits.shape == (257,)
    assert all(layer.guess < 257 for layer in walk.layers)
    assert all(guess.token < 257 for guess in rank_guesses(walk, BYTES))


@pytest.mark.parametrize("text", ["<script>alert('&')</script>", "né 🎲", "x" * 40, ""])
def test_the_page_needs_nothing_else_whatever_the_text(text: str) -> None:
    model = make(dataclasses.replace(TINY, n_ctx=64))
    walk = trace(model, encode_prompt(text, BYTES, 64), 257)
    page = render_page(walk, model, BYTES, "a <model>", text)
    tags = parse(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "model"} & {tag for tag, _ in tags}
    assert not [attrs for _, attrs in tags if {"src", "href", "onload"} & attrs.keys()]
    assert not re.search(r"https?://|url\(|@import|\bnan\b", page)
    heads, maps = 2 * 2, 2
    assert (
        sum(tag == "svg" for tag, _ in tags) == heads + maps + 5
    )  # and flow, two of vectors, ratio, guesses
    assert not re.search(r"'[<&]'", page)  # tokens are escaped wherever they are named
    told = render_text(walk, model, BYTES, "a <model>")
    assert f"(T,) = ({len(walk.ids)},)" in told
    assert len(re.findall(r"^ +\d+  ['<].*  \d+$", told, re.M)) == min(len(walk.ids), MOST_TOKENS)


def test_a_map_has_a_cell_for_every_pair_and_its_share_on_it() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.5, 0.125, 0.375]])
    tags = parse(draw_attention(weights, ["'a'", "'b'", "'<'"], "x"))
    cells = [attrs for tag, attrs in tags if tag == "rect"]
    assert [attrs["fill-opacity"] for attrs in cells] == ["1.00", "0.25", "0.75", "0.50", "0.12", "0.38"]
    assert len({(attrs["x"], attrs["y"]) for attrs in cells}) == 6
    assert "&#x27;b&#x27; takes 25.0% from &#x27;a&#x27;" in draw_attention(
        weights, ["'a'", "'b'", "'<'"], "x"
    )


def test_explain_works_without_a_checkpoint_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["explain", "Every effort moves you", "--threads", "1"]) == 0
    told = capsys.readouterr().out
    for part in (
        "it has learned nothing", "7,234,432 parameters", "' effort'  3626", "(T,) -> (T, C) = (4, 128)",
        "4·C² = 65,536 parameters a block", "8·C² = 131,072 parameters a block", "is 1 : 2", "(V,) = (50257,)",
        "picture  explain.html",
    ):  # fmt: skip
        assert part in told
    page = (tmp_path / "explain.html").read_text(encoding="utf-8")
    assert "it has learned nothing" in page
    assert "4·C² = 65,536" in page
    assert [path.name for path in tmp_path.iterdir()] == ["explain.html"]


def test_explain_reads_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(dataclasses.replace(TINY, tied=False, qkv_bias=False))
    export_model(saved_of(model), "book", tmp_path / "b.safetensors")
    import_model(tmp_path / "b.safetensors", tmp_path / "run")
    out = tmp_path / "pages" / "x.html"
    command = [
        "explain",
        "3 times 4",
        "--checkpoint",
        str(tmp_path / "run"),
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    told = capsys.readouterr().out
    with torch.no_grad():
        logits = model(torch.tensor([list(b"3 times 4")]))[0, -1]
    best = float(logits.softmax(0).max())
    assert f"{best:.1%}  {'#' * round(40 * best)}" in told
    assert f"{tmp_path / 'run'}, step 0" in told
    assert "no bias for query, key and value" in told
    assert "a matrix of its own (257, 16): 4,112 parameters" in told
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["x y " * 100], "tokens long, and the model sees 64 at once"),
        (["x", "--checkpoint", "nowhere"], "nowhere: there is no such folder"),
        (["x", "--checkpoint", "."], "neither a complete checkpoint nor a run"),
        (["x", "--out", "file/x.html"], "could not be written"),
        (["x", "--out", "folder"], "could not be written"),
    ],
)
def test_errors_are_read_by_people(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert main(["explain", *arguments, "--threads", "1"]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert complaint in shown.err
    assert "Traceback" not in shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
