"""Writing shards so that a cut at any moment costs little: what is in the journal is on the disk, and is checked.

A shard is written with an empty header, which is filled in when it is full. The journal says how many tokens of
each split are safe and their CRC-32; going on means to cut the files back to that, check them, and append.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from workload.data import (
    HEADER_BYTES,
    META,
    check_tokens,
    list_token_files,
    load_meta,
    load_tokens,
    render_header,
)
from workload.errors import WorkloadError
from workload.files import FULL, hash_file, replace_text

SHARD_TOKENS = 100_000_000  # llm.c's; 200 MB


@dataclass(frozen=True)
class Shard:
    """What meta.json says of a file."""

    tokens: int
    sha256: str  # of the whole file, as sha256sum prints it
    largest: int  # token in it; -1: it has none


@dataclass(frozen=True)
class Progress:
    """Of one split: its full shards, and the safe part of the one that is being written."""

    shards: tuple[Shard, ...] = ()
    tokens: int = 0
    crc32: int = 0  # of the bytes of these tokens
    largest: int = -1

    @property
    def total(self) -> int:
        return sum(shard.tokens for shard in self.shards) + self.tokens

    @classmethod
    def parse(cls, table: Mapping[str, Any]) -> "Progress":
        return cls(**{**table, "shards": tuple(Shard(**shard) for shard in table["shards"])})


class ShardWriter:
    """Tokens into ``SPLIT_000000.bin …`` of at most `limit` tokens each, going on from `progress`."""

    def __init__(
        self, folder: Path, split: str, limit: int = SHARD_TOKENS, progress: Progress | None = None
    ) -> None:
        self.progress = progress or Progress()
        self._folder, self._split, self._limit = folder, split, limit
        self._file: BinaryIO | None = None
        if self.progress.tokens:
            path = self._path(len(self.progress.shards))
            self._file = path.open("r+b")
            self._file.truncate(HEADER_BYTES + 2 * self.progress.tokens)
            self._file.seek(0, os.SEEK_END)

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._split}_{number:06d}.bin"

    def add(self, tokens: npt.NDArray[np.uint16]) -> None:
        rest = tokens
        while rest.size:
            if self._file is None:
                self._file = self._path(len(self.progress.shards)).open("wb")
                self._file.write(render_header(0))
            now = rest[: self._limit - self.progress.tokens]
            data = now.astype("<u2", copy=False).tobytes()
            self._file.write(data)
            self.progress = replace(
                self.progress,
                tokens=self.progress.tokens + now.size,
                crc32=zlib.crc32(data, self.progress.crc32),
                largest=max(self.progress.largest, int(now.max())),
            )
            rest = rest[now.size :]
            if self.progress.tokens == self._limit:
                self._finish()

    def sync(self) -> Progress:
        """What is safe when this returns."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self.progress

    def abandon(self) -> None:
        """Let go of the file as it is; what the journal calls safe stays."""
        if self._file is not None:
            with suppress(OSError):  # a full disk has no room for the rest either
                self._file.close()
            self._file = None

    def close(self) -> Progress:
        """Finish the last shard; returns the shards there are."""
        if self._file is not None:
            self._finish()
        return self.progress

    def _finish(self) -> None:
        assert self._file is not None
        was = self.progress
        self._file.seek(0)
        self._file.write(render_header(was.tokens))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        digest = hash_file(self._path(len(was.shards)))
        self.progress = Progress((*was.shards, Shard(was.tokens, digest, was.largest)))


def check_progress(folder: Path, split: str, progress: Progress) -> None:
    """Look at what a journal calls safe, and remove what came after it. Raises WorkloadError when it is not as said."""
    numbers = range(len(progress.shards) + bool(progress.tokens))
    expected = {f"{split}_{number:06d}.bin" for number in numbers}
    for path in folder.glob(f"{split}_*.bin"):
        if path.name not in expected:
            path.unlink()
    for number, shard in enumerate(progress.shards):
        path = folder / f"{split}_{number:06d}.bin"
        with _readable(path):
            _compare(path, hash_file(path), shard)
    if progress.tokens:
        path = folder / f"{split}_{len(progress.shards):06d}.bin"
        crc, left = 0, 2 * progress.tokens
        with _readable(path), path.open("rb") as file:
            file.seek(HEADER_BYTES)
            while left and (part := file.read(min(left, 1 << 22))):
                crc = zlib.crc32(part, crc)
                left -= len(part)
        if left or crc != progress.crc32:
            raise WorkloadError(
                f"{path}: its first {progress.tokens} tokens are not those that were written",
                f"the disk lost them; begin again: rm -r {folder}",
            )


def _compare(path: Path, sha256: str, shard: Shard) -> None:
    if sha256 != shard.sha256:
        raise WorkloadError(
            f"{path}: sha256 is {sha256}, but {shard.sha256} was written",
            f"it was changed or damaged; remove {path.parent} and prepare it again",
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise WorkloadError(f"{path} is missing", f"remove {path.parent} and prepare it again") from error


def load_shards(folder: Path) -> dict[str, Shard]:
    """The shards that meta.json lists; empty for a folder that has none or an old one."""
    listed = load_meta(folder).get("shards", {}) if (folder / META).exists() else {}
    try:
        assert isinstance(listed, dict)
        return {name: Shard(**about) for name, about in listed.items()}
    except (TypeError, AssertionError) as error:
        raise WorkloadError(f"{folder / META}: its list of shards is not one: {error}") from error


def check_folder(folder: Path, n_vocab: int) -> None:
    """Whether a run can read `folder`: files whole, all there, both splits, no token outside of the vocabulary.

    Of a folder that `prepare` made the sizes are looked at and meta.json believed for the rest, which takes no time
    (`verify` reads it all). Other folders are read once for their tokens, at the speed of the disk or of memory.
    """
    files = list_token_files(folder)
    listed = load_shards(folder)
    names = {path.name for paths in files.values() for path in paths}
    if listed and names != set(listed):
        missing, more = sorted(set(listed) - names), sorted(names - set(listed))
        raise WorkloadError(
            f"{folder}: {META} lists other files: "
            + "; ".join(
                f"{word} {', '.join(which[:3])}{' …' * (len(which) > 3)}"
                for word, which in (("missing", missing), ("not listed", more))
                if which
            ),
            "copy the folder again, or prepare it again",
        )
    if not listed and (folder / "meta.pkl").exists():
        raise WorkloadError(
            f"{folder} has a meta.pkl: nanoGPT's tokens of single characters, a vocabulary of its own",
            "prepare the text (its input.txt) with --tokenizer bytes",
        )
    for split, paths in files.items():
        n_tokens = 0
        for path in paths:
            shard, seen = listed.get(path.name), len(load_tokens(path))
            if shard is not None and seen != shard.tokens:
                raise WorkloadError(
                    f"{path}: {seen} tokens, but {META} says {shard.tokens}",
                    "copy it again, or prepare it again",
                )
            if shard is None or shard.largest >= n_vocab:
                check_tokens(path, n_vocab)
            n_tokens += seen
        if n_tokens < 2:  # one to read, one to guess
            held = f"{n_tokens} tokens" if paths else f"no {split}_*.bin"
            what = {"train": "there is nothing to train on", "val": "the validation split is empty"}[split]
            raise WorkloadError(
                f"{folder}: {held}: {what}", "make both with python -m workload prepare TEXT --out FOLDER"
            )


def verify(folder: Path, n_vocab: int) -> dict[str, Shard]:
    """Read every byte: checksums where meta.json has them, and every token; returns what was seen, by file.

    Raises WorkloadError for the first file that is not as it was made.
    """
    check_folder(folder, n_vocab)
    listed, seen = load_shards(folder), {}
    for path in sorted(path for paths in list_token_files(folder).values() for path in paths):
        shard = Shard(len(load_tokens(path)), hash_file(path), check_tokens(path, n_vocab))
        if path.name in listed:
            _compare(path, shard.sha256, listed[path.name])
        seen[path.name] = shard
    return seen


def save_json(path: Path, table: Mapping[str, object]) -> None:
    """Write it at once or not at all."""
    replace_text(path, json.dumps(table, indent=1))


def describe_shards(split: str, progress: Progress) -> dict[str, dict[str, object]]:
    """As meta.json lists them."""
    return {f"{split}_{number:06d}.bin": asdict(shard) for number, shard in enumerate(progress.shards)}


@contextmanager
def full_disk_is_readable(folder: Path) -> Iterator[None]:
    """A full disk, quota or largest file becomes a WorkloadError that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        raise WorkloadError(
            f"{folder}: the disk is full ({error.strerror}; {free / 1e6:,.0f} MB are free)",
            "what was finished is kept: make room, and the same command goes on",
        ) from error
