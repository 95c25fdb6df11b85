"""Pieces of a source to tokens: what each worker of `prepare` does."""

import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from workload.data import load_tensor
from workload.errors import WorkloadError
from workload.shards import SHARD_TOKENS
from workload.sources import PIECE_BYTES, Piece, Segment, chunks, read_piece
from workload.tokenizer import count_bytes, load_tokenizer

CHUNK_CHARS = 1 << 18  # text handed to the tokenizer at once
SPLITS = ("train", "val")
Array = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Request:
    """What decides the tokens, besides the files."""

    source: str
    tokenizer: str
    val_fraction: float
    tokens: int = 0  # of train at most, and of val in proportion; 0: all
    column: str = "text"
    piece_bytes: int = PIECE_BYTES
    shard_tokens: int = SHARD_TOKENS

    def limit(self, split: str) -> int:
        """Tokens that a split may have."""
        if not self.tokens:
            return sys.maxsize
        return (
            self.tokens
            if split == "train"
            else int(self.tokens * self.val_fraction / (1 - self.val_fraction))
        )


@dataclass
class Encoded:
    """A piece as tokens, by split."""

    tokens: dict[str, Array]
    n_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # of text, in UTF-8
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # that end in it
    bad: int = 0  # rows left out because they had no text
    empty: int = 0  # rows of no characters


def encode_piece(piece: Piece, request: Request, skip_bad: bool, threads: int = 1) -> Encoded:
    """The tokens of a piece; a pure function of the piece and its files."""
    tokenizer = load_tokenizer(request.tokenizer)
    end = np.array([tokenizer.eot], dtype=np.uint16)
    parts: dict[str, list[Array]] = {split: [] for split in SPLITS}
    encoded = no_tokens()
    for segment in (s for s in piece if s.kind == "tokens"):
        assert segment.split is not None
        parts[segment.split].append(_copy_tokens(segment, tokenizer.eot))
    batch: list[tuple[str, str, bool]] = []  # (split, text, whether a document ends with it)

    def flush() -> None:
        for (split, _, ends), tokens in zip(
            batch, tokenizer.encode_all([text for _, text, _ in batch], threads), strict=True
        ):
            parts[split].append(np.array(tokens, dtype=np.uint16))
            if ends:
                parts[split].append(end)
        batch.clear()

    others = tuple(s for s in piece if s.kind != "tokens")
    chars = 0
    for text in read_piece(
        others, val_fraction=request.val_fraction, column=request.column, skip_bad=skip_bad
    ):
        if isinstance(text, str):
            encoded.bad += text == "bad"
            encoded.empty += text == "empty"
            continue
        encoded.n_bytes[text.split] += text.n_bytes
        encoded.documents[text.split] += text.ends and bool(text.text)
        *firsts, last = chunks(text.text, CHUNK_CHARS)
        batch += [(text.split, part, False) for part in firsts]
        if last:
            batch.append((text.split, last, text.ends))
        chars += len(text.text)
        if chars > CHUNK_CHARS * 4 * threads:
            flush()
            chars = 0
    flush()
    none = np.zeros(0, dtype=np.uint16)
    encoded.tokens = {split: np.concatenate([none, *parts[split]]) for split in SPLITS}
    for split in SPLITS:
        if any(s.kind == "tokens" for s in piece):
            lengths = np.array(count_bytes(tokenizer))
            encoded.n_bytes[split] = int(lengths[encoded.tokens[split]].sum())
            encoded.documents[split] = int((encoded.tokens[split] == tokenizer.eot).sum())
    return encoded


def no_tokens() -> Encoded:
    return Encoded({split: np.zeros(0, dtype=np.uint16) for split in SPLITS})


def _copy_tokens(segment: Segment, eot: int) -> Array:
    tokens = np.asarray(load_tensor(segment.path)[segment.begin : segment.end])
    outside = (tokens < 0) | (tokens > eot)
    if outside.any():
        at = int(np.argmax(outside))
        raise WorkloadError(
            f"{segment.path}: token {tokens[at]} at position {segment.begin + at}; the vocabulary has 0 … {eot}",
            "the tokens are of another tokenizer, or padded: make them again from the text",
        )
    return tokens.astype(np.uint16)


def begin_worker() -> None:
    """Ctrl-C is for the first process; and none of these stays when that one is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
