"""HellaSwag, LAMBADA and the perplexity of a text: against numbers made by hand, and against a forward pass a token."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workload.__main__ import main
from workload.commands.evaluate import show
from workload.config import ModelConfig
from workload.errors import WorkloadError
from workload.model import GPT2
from workload.tasks import (
    Choice,
    Span,
    cut_windows,
    load_hellaswag,
    load_lambada,
    score_hellaswag,
    score_lambada,
    score_spans,
    score_text,
)
from workload.tokenizer import Bytes

LN2 = math.log(2)
BITS = {
    " ": 3,
    "a": 1,
    "b": 2,
    "c": 4,
}  # of information in each letter: its probability is 2 to the minus that
LETTERS = Bytes()


def bare(vocab_size: int, n_ctx: int = 16, n_embd: int = 8) -> GPT2:
    """A model whose blocks add nothing."""
    config = ModelConfig(n_layer=1, n_head=1, n_embd=n_embd, n_ctx=n_ctx, vocab_size=vocab_size, tied=False)
    model = GPT2(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name or name.startswith("wpe"):
                parameter.zero_()
    return model.eval()


@pytest.fixture
def letters() -> GPT2:
    """Predicts every letter with the probability of BITS, whatever came before; rows of no token are the likeliest."""
    model = bare(vocab_size=320)
    assert model.lm_head is not None
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.zero_()[0] = 1.0  # so that the logits are the first column of the head
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, 0] = -1e4
        for letter, bits in BITS.items():
            model.lm_head.weight[ord(letter), 0] = -bits * LN2
        # What is left over goes to end-of-text: probabilities add to one, so a logit is a log-probability.
        model.lm_head.weight[256, 0] = math.log(1 - sum(2.0**-bits for bits in BITS.values()))
        model.lm_head.weight[257:, 0] = 1e4
    return model


@pytest.fixture
def chain() -> GPT2:
    """Predicts b after a, c after b and so on."""
    model = bare(vocab_size=257, n_embd=257)
    assert model.lm_head is not None
    with torch.no_grad():
        model.wte.weight.copy_(torch.eye(257))
        model.lm_head.weight.copy_(torch.eye(257).roll(1, 0))
        model.lm_head.weight[ord(" ")] = 0
        model.lm_head.weight[ord(" "), ord("x")] = 2  # a space after x
        model.lm_head.weight[:, ord(" ")] = 0
        model.lm_head.weight[ord("a"), ord(" ")] = 2  # an a after a space
    return model


def test_hellaswag_by_hand(letters: GPT2) -> None:
    """ " aaa" has 3 + 3·1 = 6 bits in 4 tokens, " b" 3 + 2 = 5 in 2, " c" 7 in 2, " cc" 11 in 3.

    By the sum " b" wins with 5 bits; by the mean " aaa" does with 1.5 bits a token.
    """
    endings = ("b", "aaa", "c", "cc")
    by_mean, by_sum = Choice("ab", endings, 1), Choice("", endings, 0)
    scores = [
        score_hellaswag(letters, LETTERS, choices, dtype=torch.float32)
        for choices in ([by_mean], [by_sum], [by_mean, by_mean, by_sum])
    ]
    assert [(s.accuracy_norm, s.accuracy) for s in scores[:2]] == [(1.0, 0.0), (0.0, 1.0)]
    assert scores[2].accuracy_norm == pytest.approx(2 / 3)
    assert scores[2].accuracy == pytest.approx(1 / 3)
    assert scores[2].examples == 3


def test_nats_are_those_of_the_probabilities(letters: GPT2) -> None:
    text = list(b"ab cc")
    found = score_spans(
        letters, [Span(text, 4), Span(text, 1), Span([256, *text], 5)], n_vocab=257, dtype=torch.float32
    )
    assert [score.nats / LN2 for score in found] == pytest.approx([2 + 3 + 4 + 4, 4, 1 + 2 + 3 + 4 + 4])
    assert [score.greedy for score in found] == [False, False, False]


def test_lambada_by_hand(letters: GPT2, chain: GPT2) -> None:
    found = score_lambada(chain, LETTERS, ["so x abc", "so x abd", "we x a"], dtype=torch.float32)
    assert found.accuracy == pytest.approx(2 / 3)  # every letter of the last word, and the space before it
    # " ab" has 6 bits and " c" has 7: 2**6.5 a word, and not a token.
    assert score_lambada(letters, LETTERS, ["b ab", "a c"], dtype=torch.float32).perplexity == pytest.approx(
        2**6.5, rel=1e-4
    )


@pytest.mark.parametrize("stride", [1, 5, 16, 0])
def test_a_text_by_hand(letters: GPT2, stride: int) -> None:
    text = "ab cab " * 9
    bits = sum(BITS[letter] for letter in text) / len(text)
    found = score_text(letters, LETTERS, text, dtype=torch.float32, stride=stride)
    assert (found.tokens, found.bytes, found.stride) == (63, 63, stride or 8)
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert found.nats_per_token == pytest.approx(bits * LN2, rel=1e-5)
    assert found.perplexity == pytest.approx(2**bits, rel=1e-4)


def test_scores_are_those_of_a_forward_pass_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, padding, order and parts change nothing; a stride of 1 gives each token all the context there is."""
    monkeypatch.setattr("workload.tasks.TOKENS_AT_ONCE", 40)
    monkeypatch.setattr("workload.tasks.LOGITS_AT_ONCE", 7)
    torch.manual_seed(1)
    model = GPT2(ModelConfig(n_layer=2, n_head=2, n_embd=16, n_ctx=16, vocab_size=257, init_std=0.5)).eval()

    @torch.no_grad()
    def nats(before: list[int], token: int) -> tuple[float, bool]:
        logits = model(torch.tensor([before[-16:]]))[0, -1]
        return -float(logits.log_softmax(0)[token]), int(logits.argmax()) == token

    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(257, (n,), generator=generator).tolist() for n in (2, 17, 9, 30, 17, 5, 12)]
    scored = [1, 16, 3, 1, 2, 4, 11]
    found = score_spans(
        model, [Span(r, n) for r, n in zip(rows, scored, strict=True)], n_vocab=257, dtype=torch.float32
    )
    for row, n, score in zip(rows, scored, found, strict=True):
        row = row[-17:]
        expected = [nats(row[:t], row[t]) for t in range(len(row) - n, len(row))]
        assert score.nats == pytest.approx(sum(value for value, _ in expected), rel=1e-4)
        assert score.greedy == all(best for _, best in expected)
    text = "The stride is one."
    tokens = [256, *text.encode()]
    expected_nats = sum(nats(tokens[:t], tokens[t])[0] for t in range(1, len(tokens)))
    whole = score_text(model, LETTERS, text, dtype=torch.float32, stride=1)
    assert whole.nats_per_token * whole.tokens == pytest.approx(expected_nats, rel=1e-4)


@given(st.integers(2, 200), st.integers(1, 20), st.data())
def test_windows_score_each_token_once_after_enough_others(n: int, n_ctx: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, n_ctx))
    tokens = list(range(n))
    seen: list[int] = []
    for span in cut_windows(tokens, n_ctx, stride):
        assert len(span.tokens) <= n_ctx + 1
        first = span.tokens[-span.scored]
        assert len(span.tokens) - span.scored >= min(first, n_ctx - stride, 1 if first == 1 else n_ctx)
        seen += span.tokens[-span.scored :]
    assert seen == tokens[1:]


GOOD = {"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": 2}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"ctx": "A', "line 3: not JSON"),
        ("[]", "line 3: expected an object"),
        (json.dumps({**GOOD, "label": 4}), "line 3: expected {"),
        (json.dumps({**GOOD, "label": ""}), "line 3: expected {"),  # the test split: not published
        (json.dumps({**GOOD, "label": True}), "line 3: expected {"),
        (json.dumps({**GOOD, "endings": ["a", 1, "c", "d"]}), "line 3: expected {"),
        (json.dumps({"text": "two words"}), "line 3: expected {"),
    ],
)
def test_a_wrong_line_of_hellaswag_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "h.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(WorkloadError, match=r"h\.jsonl, line") as error:
        load_hellaswag(path)
    assert complaint in str(error.value)
    assert load_hellaswag(path, limit=1) == [Choice("A man", ("a", "b", "c", "d"), 2)]


@pytest.mark.parametrize("text", ["one", "", " one", "one ", 5])
def test_a_wrong_line_of_lambada_is_named(tmp_path: Path, text: object) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text(f"{json.dumps({'text': 'a good one'})}\n{json.dumps({'text': text})}\n")
    with pytest.raises(WorkloadError, match=r"l\.jsonl, line 2: expected"):
        load_lambada(path)
    assert load_lambada(path, limit=1) == ["a good one"]


def test_files_that_are_empty_or_not_there_and_spans_that_do_not_fit(tmp_path: Path, letters: GPT2) -> None:
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(WorkloadError, match="nothing in it"):
        load_lambada(tmp_path / "e.jsonl")
    with pytest.raises(WorkloadError, match="cannot be read: No such file"):
        load_hellaswag(tmp_path / "no.jsonl")
    with pytest.raises(WorkloadError, match=r"18 tokens are to be scored together, but the context .* is 16"):
        score_lambada(letters, LETTERS, ["a " + "b" * 17], dtype=torch.float32)
    with pytest.raises(WorkloadError, match="a stride of 17 tokens"):
        score_text(letters, LETTERS, "abc", dtype=torch.float32, stride=17)


def test_progress_on_stderr_is_one_line_or_few() -> None:
    now = [0.0]
    log = io.StringIO()
    report = show("hellaswag", log, lambda: now[0])
    for done in range(1, 41):
        now[0] = float(done)
        report(done * 100, 4000)
    assert log.getvalue().splitlines() == ["hellaswag  1,500/4,000  38%", "hellaswag  3,000/4,000  75%"]


def test_eval_scores_files_for_people_and_for_programs(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, swag, last = tmp_path / "run", tmp_path / "h.jsonl", tmp_path / "l.jsonl"
    sizes = (
        "n_layer=1 n_head=2 n_embd=16 n_ctx=32 batch=2 micro_batch=2 steps=1 sample_tokens=0 eval_sequences=2"
    )
    settings = [*sizes.split(), "tokenizer=bytes", f"data.source={text}"]
    assert main(["train", "--out", str(out), "--threads", "1", "--device", "cpu", "--set", *settings]) == 0
    swag.write_text(f"{json.dumps(GOOD)}\n" * 3)
    last.write_text(f"{json.dumps({'text': 'a good one'})}\n" * 3 + "rubbish\n")
    capsys.readouterr()
    begin = ["eval", str(out), "--checkpoint", "latest", "--threads", "1"]
    files = ["--hellaswag", str(swag), "--lambada", str(last), "--text", str(text)]
    assert main([*begin, *files, "--limit", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0].split(" of ")[0] for line in lines][1].startswith("step 1: LAMBADA 0.00%")
    assert len(lines) == 3
    assert "bits/byte, over " in lines[2]
    assert "stride 16" in lines[2]
    assert main([*begin, *files, "--limit", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["model", "step", "hellaswag", "lambada", "text"]
    assert (found["hellaswag"]["examples"], found["lambada"]["examples"]) == (2, 2)
    assert found["text"]["bytes"] == text.stat().st_size
    assert 0 < found["text"]["bits_per_byte"] < 10
    assert main([*begin, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["model", "step", "validation"]
    assert main([*begin, *files]) == 1
    assert f"{last}, line 4: not JSON" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"2 times 2")))
    assert main([*begin, "--text", "-", "--stride", "4"]) == 0
    assert "over 9 tokens, stride 4" in capsys.readouterr().out
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert main([*begin, "--text", str(tmp_path / "latin")]) == 1
    assert "not UTF-8 text" in capsys.readouterr().err
