"""Text files to token shards: ``python -m workload prepare FILE|FOLDER --out DIR``.

The end of every text becomes validation, the rest training, cut between two lines; no token is in both. The folder
is staged beside its place and renamed, so it is complete or does not exist.
"""

import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import BinaryIO

import numpy as np

from workload.data import META, load_meta, render_header
from workload.errors import WorkloadError
from workload.tokenizer import Tokenizer, load_tokenizer

SHARD_TOKENS = 100_000_000  # llm.c's; 200 MB
CHUNK_CHARS = 1 << 18  # text handed to the tokenizer at once
Texts = Iterable[tuple[str, str]]  # (name, text)


def prepare(
    source: str, out: Path, *, tokenizer: str, val_fraction: float, threads: int = 1
) -> dict[str, object]:
    """Make the folder `out` from "demo", a text file or a folder of them; returns its meta.json."""
    if out.exists() and any(out.iterdir()):
        raise WorkloadError(f"{out} exists and is not empty", "name another --out, or remove it")
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    meta = write_splits(load_texts(source), staging, load_tokenizer(tokenizer), val_fraction, threads)
    for split in ("train", "val"):
        if not meta[f"{split}_tokens"]:
            raise WorkloadError(
                f"{source}: no text for the {split} split", "give more text, or another val_fraction"
            )
    with (staging / META).open("w", encoding="utf-8") as file:
        json.dump({"source": source, **meta}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if out.exists():
        out.rmdir()
    staging.rename(out)
    return meta


def find_shards(source: str, cache: Path, *, tokenizer: str, val_fraction: float, threads: int = 1) -> Path:
    """The folder of shards that a run with data.source = `source` reads, made as `cache` when it is text."""
    folder = Path(source).expanduser()
    is_prepared = source != "demo" and folder.is_dir() and any(folder.glob("*.bin"))
    if not is_prepared:
        if not (cache / META).exists():
            prepare(source, cache, tokenizer=tokenizer, val_fraction=val_fraction, threads=threads)
        folder = cache
    # A folder without meta.json is llm.c's, whose tokens are GPT-2's.
    made_by = load_meta(folder).get("tokenizer") if (folder / META).exists() else "gpt2"
    if made_by != tokenizer:
        raise WorkloadError(
            f"{folder} holds tokens of {made_by}, but the run's tokenizer is {tokenizer}",
            f"add --set data.tokenizer={made_by}, or prepare the text again",
        )
    return folder


def load_texts(source: str) -> Iterator[tuple[str, str]]:
    """("name", text) of the plays in the package, a file, or every .txt and .md below a folder in order of path."""
    if source == "demo":
        plays = lzma.decompress(
            (resources.files("workload") / "assets" / "plays.txt.xz").read_bytes()
        ).decode("ascii")
        yield from ((play.partition("\n")[0], play) for play in plays.split("\f"))
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise WorkloadError(
            f"{source}: there is no such file or folder", 'data.source is "demo", a file or a folder'
        )
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md"))
    if not files:
        raise WorkloadError(f"{source}: no .txt or .md file in it")
    for file in files:
        try:
            yield file.name, file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise WorkloadError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def write_splits(
    texts: Texts, folder: Path, tokenizer: Tokenizer, val_fraction: float, threads: int
) -> dict[str, object]:
    """Write train_*.bin and val_*.bin; returns what meta.json says of them. Every text ends with end-of-text."""
    writers = {split: ShardWriter(folder, split) for split in ("train", "val")}
    sizes = {"train_bytes": 0, "val_bytes": 0}
    digest = hashlib.sha256()
    for _, text in texts:
        digest.update(text.encode("utf-8"))
        for split, part in zip(("train", "val"), split_text(text, val_fraction), strict=True):
            if not part:
                continue
            sizes[f"{split}_bytes"] += len(part.encode("utf-8"))
            for tokens in tokenizer.encode_all(list(chunks(part)), threads):
                writers[split].add(tokens)
            writers[split].add([tokenizer.eot])
    totals = {f"{split}_tokens": writer.close() for split, writer in writers.items()}
    return {"tokenizer": tokenizer.name, **totals, **sizes, "text_sha256": digest.hexdigest()}


def split_text(text: str, val_fraction: float) -> tuple[str, str]:
    """(train, val): the last `val_fraction` of the characters, from the beginning of a line."""
    at = round(len(text) * (1 - val_fraction))
    line = text.rfind("\n", 0, at) + 1
    return text[: line or at], text[line or at :]


def chunks(text: str, size: int = CHUNK_CHARS) -> Iterator[str]:
    """Pieces of about `size` characters whose tokens, one after another, are those of the whole text.

    GPT-2's pattern always cuts before the newline that begins a line, so a piece may begin there; a newline among
    other spaces may be inside a token.
    """
    begin = 0
    while len(text) - begin > size:
        end = begin + size
        while end < len(text) - 1 and not (
            text[end] == "\n" and not text[end - 1].isspace() and not text[end + 1].isspace()
        ):
            end += 1
        if end >= len(text) - 1:
            break
        yield text[begin:end]
        begin = end
    yield text[begin:]


class ShardWriter:
    """Tokens into ``SPLIT_000000.bin …`` of at most `limit` tokens each; headers are written when a shard is full."""

    def __init__(self, folder: Path, split: str, limit: int = SHARD_TOKENS) -> None:
        self._folder, self._split, self._limit = folder, split, limit
        self._file: BinaryIO | None = None
        self._in_shard = self._shards = self._total = 0

    def add(self, tokens: list[int]) -> None:
        rest = np.array(tokens, dtype="<u2")
        while rest.size:
            if self._file is None:
                self._file = (self._folder / f"{self._split}_{self._shards:06d}.bin").open("wb")
                self._file.write(render_header(0))
            now = rest[: self._limit - self._in_shard]
            self._file.write(now.tobytes())
            self._in_shard += now.size
            rest = rest[now.size :]
            if self._in_shard == self._limit:
                self._finish()

    def close(self) -> int:
        """Finish the last shard; returns the number of tokens written in all."""
        self._finish()
        return self._total

    def _finish(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(render_header(self._in_shard))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._total += self._in_shard
        self._shards += 1
        self._in_shard = 0
