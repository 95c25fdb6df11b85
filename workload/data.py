"""Token shards on disk, and the order in which a run sees them.

A shard is llm.c's ``.bin``: 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then
the tokens as uint16. A folder made by `prepare` holds ``train_000000.bin …``, ``val_000000.bin …`` and
``meta.json``, written last.

The order is arithmetic, not state: sequence number *i* of a run is window `order(i % n)` of epoch `i // n`. So a
run that goes on from sequence *i* sees exactly what it would have seen, whatever its batch size, and nothing is
shuffled in memory.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from workload.errors import WorkloadError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
META = "meta.json"
Tokens = npt.NDArray[np.uint16]
Indexes = npt.NDArray[np.uint64]
Batch = npt.NDArray[np.int64]


def render_header(n_tokens: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, n_tokens
    return header.tobytes()


def load_shard(path: Path) -> Tokens:
    """The tokens of a shard, memory-mapped. Raises WorkloadError for anything that is not one, whole."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=min(HEADER_BYTES, size) // 4)
    if header.size < HEADER_BYTES // 4:
        raise WorkloadError(f"{path}: {size} bytes, too short for the header of a token shard")
    magic, version, n_tokens = (int(number) for number in header[:3])
    if (magic, version) != (MAGIC, VERSION):
        raise WorkloadError(f"{path}: magic {magic}, version {version}; a token shard has {MAGIC}, {VERSION}")
    if n_tokens < 0 or size != HEADER_BYTES + 2 * n_tokens:
        raise WorkloadError(
            f"{path}: its header says {n_tokens} tokens, {HEADER_BYTES + 2 * n_tokens} bytes; it has {size} bytes",
            "it is cut or damaged: make it again with python -m workload prepare",
        )
    if n_tokens == 0:
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(n_tokens,))


def load_split(folder: Path, split: str) -> list[Tokens]:
    """Shards of "train" or "val" in the order of their names."""
    shards = [load_shard(path) for path in sorted(folder.glob(f"*{split}_*.bin"))]
    if not shards:
        raise WorkloadError(
            f"{folder}: no {split}_*.bin", "make it with python -m workload prepare TEXT --out FOLDER"
        )
    return shards


def load_meta(folder: Path) -> dict[str, object]:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkloadError(f"{folder}: cannot read {META}: {error}") from error
    return meta if isinstance(meta, dict) else {}


def shuffle(index: Indexes, n: int, key: int) -> Indexes:
    """Where each of `index`, numbers below `n`, goes in a permutation of 0 … n-1 that `key` chooses.

    A Feistel network over the next even number of bits, walked until it falls below n again: a bijection without a
    table, so a shuffle of 10⁷ windows costs nothing, and no library's random stream is relied on for resuming.
    """
    half = max(1, -(-(n - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    out = index.astype(np.uint64)
    todo = np.ones(out.shape, dtype=bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(half), out[todo] & mask
        for turn in range(6):
            left, right = right, left ^ (_mix(right, 8 * key + turn) & mask)
        out[todo] = left << np.uint64(half) | right
        todo = out >= n
    return out


def _mix(value: Indexes, key: int) -> Indexes:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): every bit of the input moves every bit of the output."""
    z = value + np.uint64((key + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


class Windows:
    """Sequences of `n_ctx` tokens and the tokens after them, cut from shards without overlap.

    Each epoch begins its cuts at another place of every shard, so windows differ between epochs, and leaves out
    less than two windows a shard. A window never crosses the end of a shard. `n` is the windows of an epoch.
    """

    def __init__(self, shards: Sequence[Tokens], n_ctx: int, seed: int) -> None:
        self.shards, self.n_ctx, self.seed = shards, n_ctx, seed
        lengths = np.array([len(shard) for shard in shards], dtype=np.int64)
        self._counts = np.where(lengths > n_ctx, np.maximum(1, lengths // n_ctx - 1), 0)
        self._ends = np.cumsum(self._counts)
        # Places where the first window of a shard can begin: at least one, at most a window's length.
        self._starts = np.minimum(n_ctx, lengths - self._counts * n_ctx)
        self.n = int(self._counts.sum())
        if self.n == 0:
            raise WorkloadError(
                f"a sequence needs {n_ctx + 1} tokens, but the longest shard has {lengths.max(initial=0)}",
                "make model.n_ctx smaller, or prepare more text",
            )

    def places(self, first: int, count: int) -> list[tuple[int, int]]:
        """(shard, offset) of the run's sequences first … first + count - 1."""
        places: list[tuple[int, int]] = []
        for epoch in range(first // self.n, (first + count - 1) // self.n + 1):
            begin = max(first, epoch * self.n)
            end = min(first + count, (epoch + 1) * self.n)
            key = (self.seed << 32) + epoch
            windows = shuffle(np.arange(begin, end, dtype=np.uint64) - np.uint64(epoch * self.n), self.n, key)
            shard = np.searchsorted(self._ends, windows.astype(np.int64), side="right")
            within = windows.astype(np.int64) - self._ends[shard] + self._counts[shard]
            start = _mix(shard.astype(np.uint64), key) % self._starts[shard].astype(np.uint64)
            offset = start.astype(np.int64) + within * self.n_ctx
            places += zip(shard.tolist(), offset.tolist(), strict=True)
        return places

    def batch(self, first: int, count: int) -> Batch:
        """The run's sequences first … first + count - 1."""
        return cut(self.shards, self.places(first, count), self.n_ctx)


def spread(shards: Sequence[Tokens], n_ctx: int, count: int) -> list[tuple[int, int]]:
    """(shard, offset) of up to `count` windows at equal distances, the same at every evaluation; 0: all."""
    every = [(s, w * n_ctx) for s, shard in enumerate(shards) for w in range((len(shard) - 1) // n_ctx)]
    if count == 0 or count >= len(every):
        return every
    return [every[i * len(every) // count] for i in range(count)]


def cut(shards: Sequence[Tokens], places: Sequence[tuple[int, int]], n_ctx: int) -> Batch:
    """The windows at `places` with the token after each: (len(places), n_ctx + 1)."""
    return np.stack([shards[s][offset : offset + n_ctx + 1] for s, offset in places]).astype(np.int64)
