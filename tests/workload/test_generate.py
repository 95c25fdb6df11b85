"""Sampling."""

import torch

from tests.workload.conftest import TINY
from workload.generate import draw, generate, stream_text
from workload.model import GPT2
from workload.tokenizer import load_tokenizer


def make() -> GPT2:
    torch.manual_seed(0)
    model = GPT2(TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # opinions
    return model


def test_the_cache_gives_the_tokens_of_whole_passes() -> None:
    model, tokens = make().eval(), [5, 6, 7]
    with torch.no_grad():
        for _ in range(13):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert list(generate(model, [5, 6, 7], 13, n_vocab=257, seed=0, temperature=0)) == tokens[3:]


def test_samples_outlast_the_context_and_forget_its_older_half() -> None:
    model = make().eval()
    tokens = list(generate(model, [1] * 40, 60, n_vocab=257, seed=0, temperature=0))
    assert len(tokens) == 60
    # the 17 tokens that the full context would need have become the newest 8
    with torch.no_grad():
        expected = int(model(torch.tensor([[*[1] * 7, tokens[0]]]))[0, -1].argmax())
    assert tokens[1] == expected


def test_the_seed_decides_and_nothing_else_is_touched() -> None:
    model = make().train()
    before = torch.get_rng_state()
    one, same, other = (
        list(generate(model, [1], 30, n_vocab=257, seed=seed, temperature=1.0)) for seed in (1, 1, 2)
    )
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_ids_that_are_no_token_are_never_drawn() -> None:
    model = make()
    tokens = list(generate(model, [1], 200, n_vocab=5, seed=1, temperature=10.0, top_k=0))
    assert set(tokens) == set(range(5))


def test_temperature_and_top_k() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def drawn(temperature: float, top_k: int) -> set[int]:
        return {draw(logits, temperature, top_k, generator) for _ in range(300)}

    assert drawn(0.0, 0) == {1}
    assert drawn(1.0, 2) == {1, 2}
    assert drawn(1.0, 1) == {1}
    assert drawn(1.0, 0) == drawn(1.0, 9) == {0, 1, 2, 3}
    assert drawn(0.05, 0) == {1}


def test_it_ends_when_told_to() -> None:
    answers = iter([False, False, True])
    assert len(list(generate(make(), [1], 9, n_vocab=257, seed=1, should_stop=lambda: next(answers)))) == 2


def test_characters_are_whole_when_they_are_shown() -> None:
    tokenizer = load_tokenizer("bytes")
    pieces = list(stream_text(tokenizer, tokenizer.encode("né🎲")))
    assert pieces == ["n", "é", "🎲"]
    assert list(stream_text(tokenizer, [0xC3])) == ["\ufffd"]
    assert "".join(stream_text(tokenizer, [65, tokenizer.eot, 66])) == "A\n\nB"
