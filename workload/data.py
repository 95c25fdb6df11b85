"""Token files on disk, and the order in which a run sees them.

A shard is llm.c's ``.bin``: 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then
the tokens as uint16. A folder made by `prepare` holds ``train_000000.bin …``, ``val_000000.bin …`` and
``meta.json``, written last. Read as they are, too: llm.c's own folders, nanoGPT's ``train.bin`` and ``val.bin``
(uint16 and nothing else), and ``train.safetensors`` and ``val.safetensors`` with a tensor ``tokens`` of whole numbers.

The order is arithmetic, not state: sequence number *i* of a run is window `order(i % n)` of epoch `i // n`. So a
run that goes on from sequence *i* sees exactly what it would have seen, whatever its batch size and whatever the
number of its ranks, and nothing is shuffled in memory.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from workload.errors import WorkloadError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
MAGIC_LLAMA = 20240801  # llm.c's shards of Llama 3's tokens: version 7, uint32
META = "meta.json"
TENSOR = "tokens"
# fineweb_train_000001.bin, val_000000.bin, train.bin, tiny_shakespeare_val.bin, train.safetensors
TOKEN_FILE = re.compile(
    r"(?P<set>(?:.*[^A-Za-z])?)(?P<split>train|val)(?P<number>_\d+)?(?P<kind>\.bin|\.safetensors)"
)
# The names that safetensors gives whole numbers (its format.md).
SAFETENSORS_DTYPES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
SCAN_TOKENS = 1 << 23  # looked at together when a file is searched for tokens that do not exist
Tokens = npt.NDArray[np.integer[Any]]
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
    if magic == MAGIC_LLAMA:
        raise WorkloadError(
            f"{path}: magic {magic}, version {version}: Llama 3's tokens of 32 bits; GPT-2's have {MAGIC}, {VERSION}",
            "make the shards with llm.c's -m gpt-2, or from the text with python -m workload prepare",
        )
    if (magic, version) != (MAGIC, VERSION):
        raise WorkloadError(f"{path}: magic {magic}, version {version}; a token shard has {MAGIC}, {VERSION}")
    if n_tokens < 0 or size != HEADER_BYTES + 2 * n_tokens:
        raise WorkloadError(
            f"{path}: its header says {n_tokens} tokens, {HEADER_BYTES + 2 * n_tokens} bytes; it has {size} bytes",
            "it is cut or damaged: make it again with python -m workload prepare",
        )
    return _map(path, "<u2", HEADER_BYTES, n_tokens)


def load_tokens(path: Path) -> Tokens:
    """The tokens of a shard, of nanoGPT's ``.bin`` or of a ``.safetensors``, memory-mapped.

    A shard is known by its magic. Without it a ``.bin`` is nanoGPT's if its name has no number; the magic's second
    half would be token 55432, which GPT-2 does not have, so no file of its tokens can be taken for a shard.
    """
    if path.suffix == ".safetensors":
        return load_tensor(path)
    name = TOKEN_FILE.fullmatch(path.name)
    with path.open("rb") as file:
        magic = int.from_bytes(file.read(4), "little")
    if magic in (MAGIC, MAGIC_LLAMA) or name is None or name["number"]:
        return load_shard(path)
    return _load_raw(path)


def _load_raw(path: Path) -> Tokens:
    """nanoGPT's file: uint16 from the first byte to the last. Numbers that are wider are recognised and refused."""
    size = path.stat().st_size
    if size % 2:
        raise WorkloadError(
            f"{path}: {size} bytes are not whole tokens of 2 bytes, and it has no header of a shard"
        )
    tokens = _map(path, "<u2", 0, size // 2)
    first = np.asarray(tokens[: 1 << 16])
    # Small numbers of 32 or 64 bits have zeros between them. In GPT-2's tokens 0 is "!", hardly every second one.
    if first.size >= 16 and not first[1::2].any():
        raise WorkloadError(
            f"{path}: every second of its first {first.size} tokens is 0: numbers of 32 or 64 bits, or no tokens at all",
            "a .bin without header must be uint16, as nanoGPT writes it",
        )
    return tokens


def load_tensor(path: Path) -> Tokens:
    """The one-dimensional tensor `tokens` of a ``.safetensors``, memory-mapped, of whole numbers of any width.

    Layout: 8 bytes length of the header, the header as JSON, the tensors (github.com/huggingface/safetensors).
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, 100_000_000):
                raise ValueError("its header does not fit into it")
            header = json.loads(file.read(length))
        about = header.get(TENSOR)
        if about is None:
            held = ", ".join(name for name in header if name != "__metadata__")
            raise WorkloadError(f"{path}: there is no tensor {TENSOR} in it; it holds {held or 'none'}")
        dtype, shape, (begin, end) = about["dtype"], about["shape"], about["data_offsets"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkloadError(f"{path}: not a safetensors file: {error}") from error
    if dtype not in SAFETENSORS_DTYPES or len(shape) != 1:
        raise WorkloadError(
            f"{path}: {TENSOR} is {dtype} of shape {shape}; expected is one dimension of "
            f"{', '.join(SAFETENSORS_DTYPES)}"
        )
    width = np.dtype(SAFETENSORS_DTYPES[dtype]).itemsize
    if end - begin != shape[0] * width or 8 + length + end > size:
        raise WorkloadError(
            f"{path}: {TENSOR} has {shape[0]} numbers that end at byte {8 + length + begin + shape[0] * width}; "
            f"the file has {size}",
            "it is cut or damaged: copy it again",
        )
    return _map(path, SAFETENSORS_DTYPES[dtype], 8 + length + begin, shape[0])


def _map(path: Path, dtype: str, offset: int, n_tokens: int) -> Tokens:
    if n_tokens == 0:  # nothing cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(n_tokens,))


def list_token_files(folder: Path) -> dict[str, list[Path]]:
    """Files of "train" and "val" in the order of their names.

    Raises WorkloadError when they are not of one set: which is meant cannot be told.
    """
    files: dict[str, list[Path]] = {"train": [], "val": []}
    sets: dict[tuple[str, bool, str], str] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = TOKEN_FILE.fullmatch(path.name)
        if name is not None:
            files[name["split"]].append(path)
            sets.setdefault((name["set"], name["number"] is not None, name["kind"]), path.name)
    if len(sets) > 1:
        raise WorkloadError(
            f"{folder}: tokens of {len(sets)} kinds: {', '.join(sets.values())}",
            "keep the files of one in a folder of their own",
        )
    return files


def load_split(folder: Path, split: str) -> list[Tokens]:
    """The tokens of "train" or "val", file by file."""
    files = list_token_files(folder)[split]
    if not files:
        raise WorkloadError(
            f"{folder}: no {split}_*.bin", "make it with python -m workload prepare TEXT --out FOLDER"
        )
    return [load_tokens(path) for path in files]


def check_tokens(path: Path, n_vocab: int) -> int:
    """The largest token of a file, -1 for none; reads all of it, at the speed of the disk or of memory.

    Raises WorkloadError with the place of the first token that a vocabulary of `n_vocab` does not have.
    """
    tokens, largest = load_tokens(path), -1
    for begin in range(0, len(tokens), SCAN_TOKENS):
        part = np.asarray(tokens[begin : begin + SCAN_TOKENS])
        largest = max(largest, int(part.max()))
        if largest >= n_vocab or (part.dtype.kind == "i" and int(part.min()) < 0):
            at = int(np.argmax((part < 0) | (part >= n_vocab)))
            raise WorkloadError(
                f"{path}: token {part[at]} at position {begin + at}; the vocabulary has 0 … {n_vocab - 1}",
                "the file is damaged or of another tokenizer: make it again from the text",
            )
    return largest


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

    def batch(self, first: int, count: int, rank: int = 0, world: int = 1) -> Batch:
        """Of the run's sequences first … first + count - 1 the part of `rank`; all of them for one rank."""
        return cut(self.shards, self.places(*share(first, count, rank, world)), self.n_ctx)


def share(first: int, count: int, rank: int, world: int) -> tuple[int, int]:
    """(first, count) of one of `world` ranks: parts of equal length, one after another, that are the whole together.

    Raises WorkloadError when the parts could not be equal.
    """
    if count % world:
        raise WorkloadError(
            f"{count} sequences a step cannot be shared by {world} ranks evenly",
            "choose train.batch as a multiple of the number of processes",
        )
    return first + rank * (count // world), count // world


def spread(shards: Sequence[Tokens], n_ctx: int, count: int) -> list[tuple[int, int]]:
    """(shard, offset) of up to `count` windows at equal distances, the same at every evaluation; 0: all."""
    every = [(s, w * n_ctx) for s, shard in enumerate(shards) for w in range((len(shard) - 1) // n_ctx)]
    if count == 0 or count >= len(every):
        return every
    return [every[i * len(every) // count] for i in range(count)]


def cut(shards: Sequence[Tokens], places: Sequence[tuple[int, int]], n_ctx: int) -> Batch:
    """The windows at `places` with the token after each: (len(places), n_ctx + 1)."""
    return np.stack([shards[s][offset : offset + n_ctx + 1] for s, offset in places]).astype(np.int64)
