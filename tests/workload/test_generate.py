"""Sampling."""

import torch

from tests.workload.conftest import TINY
from workload.generate import draw, generate, generate_several, stream_text
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

    def drawn(temperature: float, top_k: int, top_p: float = 1.0) -> set[int]:
        return {draw(logits, temperature, top_k, top_p, generator) for _ in range(300)}

    assert drawn(0.0, 0) == {1}
    assert drawn(1.0, 2) == {1, 2}
    assert drawn(1.0, 1) == {1}
    assert drawn(1.0, 0) == drawn(1.0, 9) == {0, 1, 2, 3}
    assert drawn(0.05, 0) == {1}
    # probabilities 0.087 0.644 0.237 0.032: the nucleus of 0.7 is two tokens, of 0.9 three
    assert drawn(1.0, 0, 0.001) == drawn(1.0, 0, 0.64) == {1}
    assert drawn(1.0, 0, 0.65) == drawn(1.0, 0, 0.88) == {1, 2}
    assert drawn(1.0, 0, 0.9) == {0, 1, 2}
    assert drawn(1.0, 2, 0.9) == {1, 2}  # of two tokens the likelier has 0.73


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    for top_k, kept in ((0, [0, 1, 2, 3]), (2, [1, 2])):
        counts = torch.zeros(4)
        for _ in range(4000):
            counts[draw(logits, 0.5, top_k, 1.0, generator)] += 1
        expected = torch.zeros(4)
        expected[kept] = (logits[kept] / 0.5).softmax(0)
        torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.03)


def test_several_samples_at_once_are_those_of_their_seeds_alone() -> None:
    model = make()
    several = list(
        generate_several(model, [1, 2, 3], 40, samples=3, n_vocab=257, seed=5, temperature=1.0, top_p=0.9)
    )
    assert [len(row) for row in several] == [
        3
    ] * 40  # n_ctx is 16: the older half was forgotten several times
    for i in range(3):
        alone = list(generate(model, [1, 2, 3], 40, n_vocab=257, seed=5 + i, temperature=1.0, top_p=0.9))
        assert [row[i] for row in several] == alone
    assert len({tuple(row[i] for row in several) for i in range(3)}) == 3


def test_it_ends_when_told_to() -> None:
    answers = iter([False, False, True])
    assert len(list(generate(make(), [1], 9, n_vocab=257, seed=1, should_stop=lambda: next(answers)))) == 2


def test_characters_are_whole_when_they_are_shown() -> None:
    tokenizer = load_tokenizer("bytes")
    pieces = list(stream_text(tokenizer, tokenizer.encode("né🎲")))
    assert pieces == ["n", "é", "🎲"]
    assert list(stream_text(tokenizer, [0xC3])) == ["\ufffd"]
    assert "".join(stream_text(tokenizer, [65, tokenizer.eot, 66])) == "A\n\nB"
