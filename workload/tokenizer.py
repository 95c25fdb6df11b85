"""Text to token numbers and back: GPT-2's byte pairs through tiktoken, or plain bytes. No network.

Both have the same four methods and an end-of-text token, which separates documents and is never made from text.
"""

import hashlib
import lzma
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Protocol

from workload.config import TOKENIZERS
from workload.errors import WorkloadError

if TYPE_CHECKING:
    import tiktoken

# What tiktoken itself demands of vocab.bpe (tiktoken_ext/openai_public.py).
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# How GPT-2 cuts text before merging: contractions, words, numbers, other runs, spaces (openai/gpt-2 encoder.py).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def eot(self) -> int:
        """The end-of-text token, the highest number; its bytes are empty."""

    def encode(self, text: str) -> list[int]:
        """Token numbers of `text`, in which no special token is recognised."""

    def encode_all(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """The same for many texts, on several threads where that helps."""

    def to_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token, perhaps a part of a character."""


class Bytes:
    """A token is a byte of UTF-8; 256 is end-of-text."""

    name = "bytes"
    eot = TOKENIZERS["bytes"] - 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_all(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def to_bytes(self, token: int) -> bytes:
        return b"" if token == self.eot else bytes([token])


class GPT2Pairs:
    """tiktoken's `gpt2` encoding, from the merges that the package carries."""

    name = "gpt2"
    eot = TOKENIZERS["gpt2"] - 1

    def __init__(self, encoding: "tiktoken.Encoding") -> None:
        self._encoding = encoding

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_all(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)

    def to_bytes(self, token: int) -> bytes:
        return b"" if token == self.eot else self._encoding.decode_single_token_bytes(token)


@cache
def load_tokenizer(name: str) -> Tokenizer:
    if name == "bytes":
        return Bytes()
    if name != "gpt2":
        raise WorkloadError(f"there is no tokenizer {name}", f"tokenizers: {', '.join(TOKENIZERS)}")
    import tiktoken  # half a second to import, and only needed here

    ranks = parse_merges(load_merges())
    assert len(ranks) == GPT2Pairs.eot
    return GPT2Pairs(
        tiktoken.Encoding(
            "gpt2",
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": GPT2Pairs.eot},
            explicit_n_vocab=TOKENIZERS["gpt2"],
        )
    )


def load_merges() -> str:
    """The plain vocab.bpe. Raises WorkloadError when the file in the package is not OpenAI's."""
    data = lzma.decompress((resources.files("workload") / "assets" / "vocab.bpe.xz").read_bytes())
    seen = hashlib.sha256(data).hexdigest()
    if seen != MERGES_SHA256:
        raise WorkloadError(
            f"workload/assets/vocab.bpe.xz: sha256 of the plain file is {seen}, not {MERGES_SHA256}"
        )
    return data.decode("utf-8")


def parse_merges(text: str) -> dict[bytes, int]:
    """vocab.bpe → bytes of every token and its rank, which is its number.

    The file writes a byte that prints as itself and any other as one of the characters from U+0100 on,
    in order. Numbers go to the printing bytes first, then to the others, then to the merges, line by line.
    """
    printing = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printing]
    byte_of = {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(printing + others)}
    for line in text.splitlines()[1:]:  # the first line is a version
        left, right = line.split()
        ranks[bytes(byte_of[c] for c in left + right)] = len(ranks)
    return ranks


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of `tokens`; U+FFFD where they cut a character."""
    return b"".join(tokenizer.to_bytes(token) for token in tokens).decode("utf-8", errors="replace")


def count_bytes(tokenizer: Tokenizer) -> list[int]:
    """Length of every token in bytes, by number: what turns nats a token into bits a byte."""
    return [len(tokenizer.to_bytes(token)) for token in range(tokenizer.eot + 1)]
