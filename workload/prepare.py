"""Text to token shards: ``python -m workload prepare SOURCE --out DIR``.

Pieces of the source (see sources.py) become tokens in as many processes as there are cores, and are written in
their order by this one. ``.DIR.partial`` beside DIR holds what is finished, so the same command goes on after
anything: Ctrl-C, kill -9, a full disk, a network that is gone. It becomes DIR by a rename, so DIR is complete or
does not exist, and is byte for byte what an uninterrupted command would have made.

    request.json   what was asked for, and of which files; a command that asks for something else does not go on
    journal.json   (unit, piece) that comes next, and what of the shards is safe; replaced about once a second
    downloads/     files of the hub that are in use

Every document is followed by end-of-text. (llm.c writes it before each: the stream is the same but for its first and
last token.) A text is cut in two at the place where validation begins; both parts are followed by end-of-text.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from workload import hub
from workload.config import TOKENIZERS
from workload.data import META, list_token_files, load_meta
from workload.encode import SPLITS, Encoded, Request, begin_worker, encode_piece
from workload.errors import WorkloadError
from workload.files import only_one, sync
from workload.shards import (
    SHARD_TOKENS,
    Progress,
    ShardWriter,
    check_folder,
    check_progress,
    describe_shards,
    full_disk_is_readable,
    save_json,
)
from workload.sources import (
    PIECE_BYTES,
    Piece,
    Source,
    SourceFile,
    is_by_document,
    open_local,
    plan,
)
from workload.tokenizer import count_bytes, load_tokenizer

REQUEST, JOURNAL, DOWNLOADS = "request.json", "journal.json", "downloads"
FORMAT = 1  # of request.json and journal.json: another one begins again
POLL_S = 0.2  # between two looks at a download that is waited for
JOURNAL_S = 1.0  # between two journals: what a kill costs


@dataclass(frozen=True)
class Seen:
    """How far it is, for a person."""

    fraction: float  # of all that will be read
    tokens: int  # written, in all
    new: int  # of these by this command
    resumed: float  # the fraction with which this command began
    waiting: str = ""  # what for, if it is not making tokens


def prepare(
    source: str,
    out: Path,
    *,
    tokenizer: str,
    val_fraction: float,
    threads: int = 1,
    tokens: int = 0,
    column: str = "text",
    skip_bad: bool = False,
    piece_bytes: int = PIECE_BYTES,
    shard_tokens: int = SHARD_TOKENS,
    journal_s: float = JOURNAL_S,
    note: Callable[[str], None] = lambda text: None,
    watch: Callable[[Seen], None] = lambda seen: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Make the folder `out` from a source, or go on making it; returns its meta.json.

    A folder that the same request made is looked at and left. Raises WorkloadError for what a person must do.
    """
    if tokens < 0 or not 0 < val_fraction < 1:
        raise WorkloadError(
            f"--tokens {tokens} --val-fraction {val_fraction}: a count and a fraction between 0 and 1 are needed"
        )
    request = Request(source, tokenizer, val_fraction, tokens, column, piece_bytes, shard_tokens)
    out = Path(os.path.abspath(out)) if not out.name else out  # "." has no name to put another beside
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _look_at_finished(request, out, note)
    staging = out.with_name(f".{out.name}.partial")
    with full_disk_is_readable(staging):
        staging.mkdir(parents=True, exist_ok=True)
        with only_one(staging), _nothing_is_left_of_nothing(staging):
            if not (staging / META).exists():
                opened = _begin_or_go_on(request, staging, note)
                meta = _Preparation(
                    request,
                    opened,
                    staging,
                    skip_bad,
                    max(1, threads),
                    journal_s,
                    note=note,
                    watch=watch,
                    should_stop=should_stop,
                ).run()
                save_json(staging / META, meta)
            elif load_meta(staging).get("request") != asdict(request):  # ended between its last two renames
                raise WorkloadError(
                    f"{staging} is complete, for other settings", f"begin again: rm -r {staging}"
                )
            return _finish(staging, out)


def find_shards(source: str, cache: Path, *, tokenizer: str, val_fraction: float, threads: int = 1) -> Path:
    """The folder of tokens that a run with data.source = `source` reads, made as `cache` when it is text; checked."""
    folder = Path(source).expanduser()
    is_prepared = source != "demo" and folder.is_dir() and any(list_token_files(folder).values())
    if not is_prepared:
        if hub.is_named(source):
            raise WorkloadError(
                f"data.source = {source} must be downloaded first",
                f"python -m workload prepare {source} --out data/NAME, then --set data.source=data/NAME",
            )
        if not (cache / META).exists():
            prepare(source, cache, tokenizer=tokenizer, val_fraction=val_fraction, threads=threads)
        folder = cache
    # A folder without meta.json is llm.c's or nanoGPT's, whose tokens are GPT-2's.
    made_by = load_meta(folder).get("tokenizer") if (folder / META).exists() else "gpt2"
    if made_by != tokenizer:
        raise WorkloadError(
            f"{folder} holds tokens of {made_by}, but the run's tokenizer is {tokenizer}",
            f"add --set data.tokenizer={made_by}, or prepare the text again",
        )
    check_folder(folder, TOKENIZERS[tokenizer])
    return folder


def _look_at_finished(request: Request, out: Path, note: Callable[[str], None]) -> dict[str, Any]:
    made = load_meta(out).get("request") if (out / META).exists() else None
    if made != asdict(request):
        raise WorkloadError(f"{out} exists and is not empty", "name another --out, or remove it")
    meta = load_meta(out)
    if not meta["repository"] and _hash_names(open_local(request.source)) != meta["files_sha256"]:
        raise WorkloadError(
            f"{out} was made from {request.source}, which has changed since",
            "name another --out, or remove it",
        )
    check_folder(out, TOKENIZERS[request.tokenizer])
    note(f"{out} is complete already; --verify reads all of it")
    return meta


def _hash_names(source: Source) -> str:
    """Of the files' names, sizes and stamps: another one when any of them is another file."""
    files = [[file.name, file.size, file.stamp] for file in source.files]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


@contextmanager
def _nothing_is_left_of_nothing(staging: Path) -> Iterator[None]:
    """A command that failed before it began leaves no folder."""
    try:
        yield
    except WorkloadError:
        if staging.exists() and not any(staging.iterdir()):
            staging.rmdir()
        raise


def _begin_or_go_on(request: Request, staging: Path, note: Callable[[str], None]) -> Source:
    """The source, as request.json has it when there is a journal to go on from."""
    asked = {"format": FORMAT, "request": asdict(request)}
    begun = _load_json(staging / REQUEST) if (staging / REQUEST).exists() else {}
    if begun.get("format") == FORMAT:
        was = begun["request"]
        differences = [
            f"{key} {was[key]} → {value}" for key, value in asdict(request).items() if was[key] != value
        ]
        files = tuple(SourceFile(*entry) for entry in begun["files"])
        if differences and (staging / JOURNAL).exists():
            raise WorkloadError(
                f"{staging} was begun with other settings: {', '.join(differences)}",
                f"go on with the same, or begin again: rm -r {staging}",
            )
        if not differences and begun["repository"]:
            # The commit that it was begun with, whatever the branch is now; and no network to list it.
            by_document, revision = is_by_document(files), begun["revision"]
            return Source(
                request.source, files, by_document, repository=begun["repository"], revision=revision
            )
        if not differences:
            source = open_local(request.source)
            if source.files == files:
                return source
            note(f"{request.source} has changed since: beginning again")
    for path in staging.iterdir():
        if path.is_file():  # downloads are what their names say, whoever asked for them
            path.unlink()
    source = (
        hub.open_hub(request.source, staging / DOWNLOADS)
        if hub.is_named(request.source)
        else open_local(request.source)
    )
    if source.files:
        files_table = [[file.name, file.size, file.stamp] for file in source.files]
        save_json(
            staging / REQUEST,
            {**asked, "repository": source.repository, "revision": source.revision, "files": files_table},
        )
    return source


def _finish(staging: Path, out: Path) -> dict[str, Any]:
    """Only shards and meta.json stay, under the name that was asked for."""
    shutil.rmtree(staging / DOWNLOADS, ignore_errors=True)
    for name in (REQUEST, JOURNAL):
        (staging / name).unlink(missing_ok=True)
    sync(staging)
    if out.exists():
        out.rmdir()
    staging.rename(out)
    sync(out.parent)
    return load_meta(out)


class _Stopped(Exception):
    """A person asked for it."""


@dataclass
class _Preparation:
    """One command's work on a folder."""

    request: Request
    source: Source
    staging: Path
    skip_bad: bool
    threads: int
    journal_s: float
    note: Callable[[str], None]
    watch: Callable[[Seen], None]
    should_stop: Callable[[], bool]
    seen: Seen = Seen(0.0, 0, 0, 0.0)

    def __post_init__(self) -> None:
        source, staging, request = self.source, self.staging, self.request
        self.units = source.units(request.piece_bytes)
        self.unit = self.piece = 0  # what comes next
        self.counts: dict[str, int] = dict.fromkeys(
            ("train_bytes", "val_bytes", "train_documents", "val_documents", "skipped", "empty"), 0
        )
        progress: dict[str, Progress] = {split: Progress() for split in SPLITS}
        if (staging / JOURNAL).exists():
            journal = _load_json(staging / JOURNAL)
            self.unit, self.piece, self.counts = journal["unit"], journal["piece"], journal["counts"]
            progress = {split: Progress.parse(journal["splits"][split]) for split in SPLITS}
        self.resumed = sum(p.total for p in progress.values()) > 0
        for split in SPLITS:
            check_progress(staging, split, progress[split])
        self.writers = {
            split: ShardWriter(staging, split, request.shard_tokens, progress[split]) for split in SPLITS
        }

    def run(self) -> dict[str, Any]:
        if self.resumed:
            self.note(f"going on from {self._all():,} tokens, which are as they were written")
        results = self._results()
        written, had = time.monotonic(), self._all()
        begun_at: float | None = None
        try:
            for at, encoded in results:
                begun_at = self._fraction(at.begin) if begun_at is None else begun_at
                self._write(encoded)
                tokens = self._all()
                self.seen = Seen(self._fraction(at.end), tokens, tokens - had, begun_at)
                self.watch(self.seen)
                if self._is_full():
                    break
                # The demo's only piece needs no journal: there is nothing to go on with after it.
                if self.source.files:
                    if self.should_stop():
                        raise _Stopped
                    if time.monotonic() - written >= self.journal_s:
                        self._save_journal()
                        written = time.monotonic()
            return self._close()
        except _Stopped:
            self._save_journal()
            raise WorkloadError(
                f"stopped after {self._all():,} tokens, which are kept", "the same command goes on"
            ) from None
        finally:
            results.close()
            for writer in self.writers.values():
                writer.abandon()

    def _all(self) -> int:
        return sum(self._total(split) for split in SPLITS)

    def _total(self, split: str) -> int:
        return self.writers[split].progress.total

    def _fraction(self, read: float) -> float:
        return max(read, self._total("train") / self.request.tokens) if self.request.tokens else read

    def _is_full(self, split: str | None = None) -> bool:
        """Whether --tokens are there: of documents those to train on, of texts, whose ends come last, both."""
        if split is None:
            return self._is_full("train") and (self.source.by_document or self._is_full("val"))
        return self._total(split) >= self.request.limit(split)

    def _write(self, encoded: Encoded) -> None:
        for split in SPLITS:
            tokens, room = encoded.tokens[split], self.request.limit(split) - self._total(split)
            n_bytes, documents = encoded.n_bytes[split], encoded.documents[split]
            if tokens.size > room:
                tokenizer = load_tokenizer(self.request.tokenizer)
                tokens = tokens[:room]
                n_bytes = int(np.array(count_bytes(tokenizer))[tokens].sum())
                documents = int((tokens == tokenizer.eot).sum())
            self.writers[split].add(tokens)
            self.counts[f"{split}_bytes"] += n_bytes
            self.counts[f"{split}_documents"] += documents
        self.counts["skipped"] += encoded.bad
        self.counts["empty"] += encoded.empty

    def _save_journal(self) -> None:
        splits = {split: asdict(writer.sync()) for split, writer in self.writers.items()}
        save_json(
            self.staging / JOURNAL,
            {"unit": self.unit, "piece": self.piece, "counts": self.counts, "splits": splits},
        )
        for file in (file for unit in self.units[: self.unit] for file in unit):
            if self.source.repository:
                hub.forget(self.staging / DOWNLOADS, file)

    def _close(self) -> dict[str, Any]:
        request, progress = self.request, {split: writer.close() for split, writer in self.writers.items()}
        for split in SPLITS:
            if not progress[split].total:
                shutil.rmtree(self.staging)
                hint = "give more text, or another --val-fraction"
                read = f"; {self.counts['skipped']} rows had none" if self.counts["skipped"] else ""
                raise WorkloadError(f"{request.source}: no text for the {split} split{read}", hint)
        shards = {
            name: about for split in SPLITS for name, about in describe_shards(split, progress[split]).items()
        }
        if not self.source.repository and open_local(request.source).files != self.source.files:
            raise WorkloadError(
                f"{request.source} was changed while it was read", "the same command begins again"
            )
        return {
            "source": request.source,
            "repository": self.source.repository,
            "revision": self.source.revision,
            "files_sha256": _hash_names(self.source),
            "tokenizer": request.tokenizer,
            "split_by": "document" if self.source.by_document else "place in the text",
            **{f"{split}_tokens": progress[split].total for split in SPLITS},
            **self.counts,
            "shards": shards,
            "request": asdict(request),
        }

    def _results(self) -> Generator[tuple["_At", Encoded], None, None]:
        """Every piece that is left with its tokens, in order.

        Sets `unit` and `piece` to what comes after it.
        """
        with closing(self._pieces()) as pieces:
            if self.threads > 1 and self.source.n_bytes >= 2 * self.request.piece_bytes:
                yield from self._results_of_processes(pieces)
                return
            for at in pieces:
                if at is not None:
                    encoded = encode_piece(at.piece, self.request, self.skip_bad, self.threads)
                    self.unit, self.piece = at.unit, at.number + 1
                    yield at, encoded

    def _results_of_processes(
        self, pieces: "Iterator[_At | None]"
    ) -> Generator[tuple["_At", Encoded], None, None]:
        # Spawned: a fork would copy the locks of other threads as they happen to be.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.threads, context, begin_worker)
        waiting: deque[tuple[_At, Future[Encoded]]] = deque()
        try:
            for at in pieces:
                if at is not None:
                    future = pool.submit(encode_piece, at.piece, self.request, self.skip_bad)
                    waiting.append((at, future))
                # None: the next file is still on its way. What is finished is written meanwhile.
                while waiting and (at is None or len(waiting) > 2 * self.threads):
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        except BrokenProcessPool as error:
            raise WorkloadError(
                "a process that was making tokens has ended: perhaps memory was short",
                "the same command goes on; --workers 1 needs least memory",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _next(self, waiting: "deque[tuple[_At, Future[Encoded]]]") -> tuple["_At", Encoded]:
        at, future = waiting.popleft()
        encoded = future.result()
        self.unit, self.piece = at.unit, at.number + 1
        return at, encoded

    def _is_needless(self, piece: Piece) -> bool:
        """Whether all of it is for a split that has its --tokens; the writer would leave it out."""
        return bool(self.request.tokens) and all(s.split and self._is_full(s.split) for s in piece)

    def _pieces(self) -> "Generator[_At | None, None, None]":
        """The pieces from (unit, piece) on; None before a unit whose files are still being downloaded."""
        request, first, skip = self.request, self.unit, self.piece
        eot = load_tokenizer(request.tokenizer).eot
        total = max(1, self.source.n_bytes)
        before = sum(file.size for unit in self.units[:first] for file in unit)
        with hub.Fetcher(self.source, self.units, self.staging / DOWNLOADS, first) as fetcher:
            for unit in range(first, len(self.units)):
                if not fetcher.is_ready(unit):
                    yield None
                while not fetcher.is_ready(unit):
                    self.watch(replace(self.seen, waiting=fetcher.describe(unit)))
                    if self.should_stop():
                        raise _Stopped
                    time.sleep(POLL_S)
                paths = fetcher.take(unit)
                planned = list(
                    plan(
                        self.source,
                        paths,
                        val_fraction=request.val_fraction,
                        column=request.column,
                        eot=eot,
                        piece_bytes=request.piece_bytes,
                    )
                )
                size = sum(file.size for file in self.units[unit])
                weights = np.cumsum([0, *(sum(s.weight for s in piece) for piece in planned)])
                edges = (before + size * weights / max(1, weights[-1])) / total
                for number, piece in enumerate(planned):
                    if (unit > first or number >= skip) and not self._is_needless(piece):
                        yield _At(unit, number, piece, float(edges[number]), float(edges[number + 1]))
                before += size


@dataclass(frozen=True)
class _At:
    unit: int
    number: int
    piece: Piece
    begin: float  # fraction of the source's bytes that come before it
    end: float  # and with it


def _load_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(table, dict)
        return table
    except (OSError, ValueError, AssertionError) as error:
        raise WorkloadError(
            f"{path}: cannot be read: {error}", f"begin again: rm -r {path.parent}"
        ) from error
