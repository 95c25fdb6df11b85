"""GPT-2's byte pairs against two implementations that share no code with tiktoken."""

import hashlib
import lzma
from functools import cache
from importlib import resources
from itertools import pairwise

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from workload import tokenizer as module
from workload.errors import WorkloadError
from workload.sources import load_plays
from workload.tokenizer import count_bytes, decode, load_merges, load_tokenizer, parse_merges

# What of Unicode a play does not have.
ODDITIES = (
    "don't I'll we've DON'T  tab\tand  spaces \n\n\n  new\r\nlines \u00a0nbsp\u3000wide 12345 1,000.5 £€ naïve café Ünïcödé "
    "日本語のテキスト русский текст العربية עברית हिन्दी 🎲👩‍👩‍👧 <|endoftext|> \x00\x7f\ufeff x\u0301 ①²Ⅳ __init__ == != -> ...\n "
)


def slow_encode(text: str) -> list[int]:
    """Byte pair encoding as the paper tells it: merge the earliest learned pair until there is none."""
    lines = load_merges().splitlines()[1:]
    order = {tuple(line.split()): i for i, line in enumerate(lines)}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letter = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    number = {letter[byte]: i for i, byte in enumerate(visible + hidden)}
    number |= {line.replace(" ", ""): 256 + i for i, line in enumerate(lines)}

    @cache
    def encode_piece(piece: str) -> tuple[int, ...]:
        parts = [letter[byte] for byte in piece.encode("utf-8")]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: order.get(pair, 1 << 30))
            if best not in order:
                break
            merged, i = [], 0
            while i < len(parts):
                if i + 1 < len(parts) and (parts[i], parts[i + 1]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        return tuple(number[part] for part in parts)

    pieces = regex.findall(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", text
    )
    return [token for piece in pieces for token in encode_piece(piece)]


def test_tokens_are_those_of_a_plain_implementation_on_all_plays() -> None:
    text = "\n".join(load_plays()) + ODDITIES * 20
    assert len(text) > 1_000_000
    tokens = load_tokenizer("gpt2").encode(text)
    assert tokens == slow_encode(text)
    assert decode(load_tokenizer("gpt2"), tokens) == text


def test_tokens_are_those_of_the_tokenizers_library_on_all_plays() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    lines = load_merges().splitlines()[1:]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert len(letters) == 256
    printing = [c for c in letters if ord(c) < 256]  # these sort by code point, as the others do by byte
    vocabulary = {c: i for i, c in enumerate(printing + [c for c in letters if ord(c) > 255])}
    vocabulary |= {line.replace(" ", ""): 256 + i for i, line in enumerate(lines)}
    theirs = tokenizers.ByteLevelBPETokenizer(
        vocab=vocabulary, merges=[tuple(line.split()) for line in lines]
    )
    text = "\n".join(load_plays()) + ODDITIES.replace("<|endoftext|>", "") * 20
    assert load_tokenizer("gpt2").encode(text) == theirs.encode(text).ids


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    for name in ("gpt2", "bytes"):
        tokenizer = load_tokenizer(name)
        tokens = tokenizer.encode(text)
        assert b"".join(map(tokenizer.to_bytes, tokens)).decode("utf-8") == text
        assert tokenizer.eot not in tokens


def test_known_tokens() -> None:
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.encode("Hello world") == [15496, 995]  # as in OpenAI's own examples
    assert gpt2.eot == 50256
    assert gpt2.encode_all(["Hello world", ""], threads=2) == [[15496, 995], []]
    assert load_tokenizer("bytes").encode("é") == [0xC3, 0xA9]


def test_merges_alone_give_all_ranks() -> None:
    ranks = parse_merges(load_merges())
    assert sorted(ranks.values()) == list(range(50256))
    assert (ranks[b"!"], ranks[b" "], ranks[b"\x00"], ranks[b" t"]) == (0, 220, 188, 256)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_lengths_in_bytes_add_up_to_the_text(name: str) -> None:
    tokenizer = load_tokenizer(name)
    lengths = count_bytes(tokenizer)
    assert lengths[tokenizer.eot] == 0
    assert sum(lengths[token] for token in tokenizer.encode(ODDITIES)) == len(ODDITIES.encode("utf-8"))


def test_damaged_merges_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MERGES_SHA256", "0" * 64)
    with pytest.raises(WorkloadError, match="sha256 of the plain file is 1ce16647"):
        load_merges()


def test_an_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(WorkloadError, match="no tokenizer gpt3"):
        load_tokenizer("gpt3")


def test_the_assets_are_those_of_the_provenance_note() -> None:
    folder = resources.files("workload") / "assets"
    note = (folder / "PROVENANCE.md").read_text(encoding="utf-8")
    for name in ("plays.txt.xz", "vocab.bpe.xz"):
        plain = lzma.decompress((folder / name).read_bytes())
        assert hashlib.sha256(plain).hexdigest() in note
