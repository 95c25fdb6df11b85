"""What `prepare` can read, and how it is cut into pieces that processes turn into tokens alone.

A source is a list of files in a fixed order. They are planned in units (one large file, or small ones together),
a unit in pieces of about 16 MiB of text; both follow from the files alone, never from the number of processes. So
the tokens of a source are the same however it was read, and whatever was interrupted.

Validation never has text that training has. A source of **documents** (rows of jsonl or parquet, or at least 200
text files) is split by document, by a hash of the text without outer white space: a copy goes where its original
went. Of a **few texts** each gives its end, cut between two lines; a copy of a text is cut at the same place.
"""

import hashlib
import importlib
import json
import lzma
import mmap
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from workload.data import load_tensor
from workload.errors import WorkloadError

PIECE_BYTES = 1 << 24  # of text; about 4M of GPT-2's tokens, a second or two of a core
MANY_TEXTS = 200  # files from which on a folder is split by document
KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".safetensors": "tokens",
}
ROWS = ("jsonl", "parquet")
DATA_EXTRA = "pip install 'metal-to-model[data]'"
# Places in UTF-8 where GPT-2's pattern always cuts: before the newline that begins a line, and before the one space
# between two words. What may be white space outside of ASCII (U+0085, U+00A0, U+1680, U+2000 …, U+3000) is no neighbour.
SAFE_CUT = re.compile(
    rb"[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf](?=\r?\n[!-~\xc3-\xe0\xe4-\xf4])|[A-Za-z](?= [A-Za-z])",
    re.DOTALL,
)
WORD = re.compile(r"[a-z]+")
Split = Literal["train", "val"]
Buffer = bytes | mmap.mmap


@dataclass(frozen=True)
class SourceFile:
    name: str  # below the folder, or in the repository
    size: int  # bytes
    stamp: str  # another one when the file is another: its time of change, or its checksum in the repository

    @property
    def kind(self) -> str:
        return KINDS[Path(self.name).suffix.lower()]


@dataclass(frozen=True)
class Source:
    name: str  # as a person wrote it
    files: tuple[SourceFile, ...]  # none: the demo, which is in the package
    by_document: bool
    folder: Path | None = None  # where the files are
    repository: str = ""  # or where on the hub: OWNER/NAME
    revision: str = ""  # and its commit

    @property
    def n_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def units(self, piece_bytes: int) -> list[tuple[SourceFile, ...]]:
        """Files in order, small ones together until they make a piece."""
        units: list[list[SourceFile]] = []
        room = 0
        for file in self.files:
            if not units or file.size > room:
                units.append([])
                room = piece_bytes
            units[-1].append(file)
            room -= file.size
        return [tuple(unit) for unit in units] if units else [()]


@dataclass(frozen=True)
class Segment:
    """A part of a file that can be read alone."""

    kind: str  # demo, or one of KINDS
    path: Path
    begin: int  # bytes of text and jsonl, rows of parquet, numbers of tokens, plays of the demo
    end: int
    weight: int  # bytes of text, about
    split: Split | None = None  # None: decided document by document
    ends: bool = False  # of text: a document ends here


Piece = tuple[Segment, ...]


@dataclass(frozen=True)
class Text:
    """Text for a split; `ends`: the document ends with it."""

    split: Split
    text: str
    n_bytes: int  # in UTF-8
    ends: bool


def load_library(module: str, what: str) -> Any:
    """An optional library. Raises WorkloadError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise WorkloadError(
            f"{what} needs {module.partition('.')[0]}, which cannot be loaded: {error}", DATA_EXTRA
        ) from error


def open_local(name: str) -> Source:
    """The demo, a file, or every file below a folder that can be read, in order of path."""
    if name == "demo":
        return Source(name, (), by_document=False)
    path = Path(name).expanduser()
    if not path.exists():
        raise WorkloadError(
            f"{name}: there is no such file or folder",
            'a source is "demo", a file, a folder, hf:OWNER/NAME or fineweb-10b',
        )
    if path.is_file():
        if path.suffix.lower() not in KINDS and path.suffix.lower() in (
            ".bin",
            ".json",
            ".csv",
            ".gz",
            ".zst",
        ):
            raise WorkloadError(
                f"{name}: {path.suffix} is not read; text, .jsonl, .parquet and .safetensors with tokens are",
                "a .bin of tokens is used where it is: --set data.source=FOLDER",
            )
        folder, paths = path.parent, [path]
    else:
        folder = path
        paths = [
            p
            for p in sorted(path.rglob("*"))
            if KINDS.get(p.suffix.lower(), "tokens") != "tokens"
            and p.is_file()
            and not any(part.startswith(".") for part in p.relative_to(path).parts)
        ]
        if not paths:
            raise WorkloadError(f"{name}: no .txt or .md file in it, and no .jsonl or .parquet")
    stats = [(p, p.stat()) for p in paths]
    files = [
        SourceFile(p.relative_to(folder).as_posix(), stat.st_size, str(stat.st_mtime_ns)) for p, stat in stats
    ]
    files = choose_training_files(files) if path.is_dir() else files
    return Source(name, tuple(files), by_document=is_by_document(files), folder=folder)


def is_by_document(files: Sequence[SourceFile]) -> bool:
    return len(files) >= MANY_TEXTS or any(kind_of(file.name) in ROWS for file in files)


def choose_training_files(files: Sequence[SourceFile]) -> list[SourceFile]:
    """Of rows the split train, when names tell the splits of a data set; otherwise everything.

    Its validation and test are left to be tested on: ours is cut from train.
    """

    def words(file: SourceFile) -> set[str]:
        return set(WORD.findall(file.name.lower()))

    if not any("train" in words(file) for file in files if kind_of(file.name) in ROWS):
        return list(files)
    others = {"test", "validation", "valid", "val", "dev", "eval"}
    return [file for file in files if "train" in words(file) or not words(file) & others]


def kind_of(name: str) -> str:
    """Of a file that is named by a person: text unless its suffix says more."""
    return KINDS.get(Path(name).suffix.lower(), "text")


def plan(
    source: Source, paths: Sequence[Path], *, val_fraction: float, column: str, eot: int, piece_bytes: int
) -> Iterator[Piece]:
    """The pieces of one unit, whose files lie at `paths`."""
    piece: list[Segment] = []
    weight = 0
    for segment in _segments(source, paths, val_fraction, column, eot, piece_bytes):
        if piece and weight + segment.weight > piece_bytes:
            yield tuple(piece)
            piece, weight = [], 0
        piece.append(segment)
        weight += segment.weight
    if piece:
        yield tuple(piece)


def _segments(
    source: Source, paths: Sequence[Path], val_fraction: float, column: str, eot: int, piece_bytes: int
) -> Iterator[Segment]:
    if not source.files:
        yield Segment("demo", Path(), 0, 0, 0)
    for path in paths:
        kind = kind_of(path.name)
        if kind == "parquet":
            yield from _plan_parquet(path, column, piece_bytes)
        elif kind == "tokens":
            yield from _plan_tokens(path, val_fraction, eot, piece_bytes)
        else:
            with _mapped(path) as text:
                if kind == "jsonl":
                    yield from _plan_jsonl(path, text, piece_bytes)
                elif source.by_document:
                    yield Segment("text", path, 0, len(text), len(text), ends=True)
                else:
                    yield from _plan_text(path, text, val_fraction, piece_bytes)


def _plan_text(path: Path, text: Buffer, val_fraction: float, piece_bytes: int) -> Iterator[Segment]:
    at = find_split(text, val_fraction)
    parts: tuple[tuple[Split, int, int], ...] = (("train", 0, at), ("val", at, len(text)))
    for split, begin, end in parts:
        cuts = [begin, *find_cuts(text, begin, end, piece_bytes), end]
        for a, b in pairwise(cuts):
            if a < b:
                yield Segment("text", path, a, b, b - a, split, ends=b == end)


def find_split(text: Buffer, val_fraction: float) -> int:
    """Where validation begins: the last `val_fraction` of the bytes, from the beginning of a line or a character."""
    at = round(len(text) * (1 - val_fraction))
    line = text.rfind(b"\n", 0, at) + 1
    if line:
        return line
    while 0 < at < len(text) and text[at] & 0xC0 == 0x80:  # inside a character
        at -= 1
    return at


def find_cuts(text: Buffer, begin: int, end: int, size: int) -> Iterator[int]:
    """Places about `size` bytes apart where text can be cut: the parts' tokens are those of the whole."""
    while end - begin > size:
        match = SAFE_CUT.search(text, begin + size - 1, end)
        if match is None:
            return
        begin = match.end()
        yield begin


def _plan_jsonl(path: Path, text: Buffer, piece_bytes: int) -> Iterator[Segment]:
    begin = 0
    while begin < len(text):
        newline = text.find(b"\n", min(begin + piece_bytes, len(text)) - 1)
        end = newline + 1 if newline >= 0 else len(text)
        yield Segment("jsonl", path, begin, end, end - begin)
        begin = end


def _plan_tokens(path: Path, val_fraction: float, eot: int, piece_bytes: int) -> Iterator[Segment]:
    """Tokens that exist: the end becomes validation, from the beginning of a document where one is near."""
    tokens = load_tensor(path)
    at = round(len(tokens) * (1 - val_fraction))
    near = max(0, at - 1_000_000)
    ends = np.flatnonzero(np.asarray(tokens[near:at]) == eot)
    if ends.size:
        at = near + int(ends[-1]) + 1
    parts: tuple[tuple[Split, int, int], ...] = (("train", 0, at), ("val", at, len(tokens)))
    for split, begin, end in parts:
        for a in range(begin, end, piece_bytes // 2):
            b = min(end, a + piece_bytes // 2)
            yield Segment("tokens", path, a, b, 2 * (b - a), split)


def _plan_parquet(path: Path, column: str, piece_bytes: int) -> Iterator[Segment]:
    file = _open_parquet(path, column)
    meta = file.metadata
    index = next(
        (i for i in range(meta.num_columns) if meta.schema.column(i).path.split(".")[0] == column), 0
    )
    begin = row = 0
    weight = 0
    for group in range(meta.num_row_groups):
        rows = meta.row_group(group).num_rows
        size = meta.row_group(group).column(index).total_uncompressed_size
        if begin < row and weight + size > piece_bytes:
            yield Segment("parquet", path, begin, row, weight)
            begin, weight = row, 0
        if size > 4 * piece_bytes and rows:
            # A process must read a group from its first row on to come to a later one: few, larger parts of it.
            parts = min(rows, -(-size // (4 * piece_bytes)))
            edges = [row + rows * i // parts for i in range(parts + 1)]
            for a, b in pairwise(edges):
                yield Segment("parquet", path, a, b, size // parts)
            begin = row + rows
        else:
            weight += size
        row += rows
    if begin < row:
        yield Segment("parquet", path, begin, row, weight)


def _open_parquet(path: Path, column: str) -> Any:
    """pyarrow's ParquetFile with a column of text in it."""
    parquet = load_library("pyarrow.parquet", path.name)
    arrow = load_library("pyarrow", path.name)
    try:
        file = parquet.ParquetFile(path, memory_map=True)
    except (arrow.ArrowException, OSError) as error:
        raise WorkloadError(
            f"{path}: not a whole parquet file: {_first_line(error)}", "copy or download it again"
        ) from error
    schema = file.schema_arrow
    if column not in schema.names:
        raise WorkloadError(
            f"{path}: there is no column {column}; it has: {', '.join(schema.names)}",
            "name the column of the text with --text-column",
        )
    kind = schema.field(column).type
    kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
    is_text = (arrow.types.is_string, arrow.types.is_large_string)
    if not any(test(kind) for test in (*is_text, arrow.types.is_null)):  # null: a file whose rows have none
        texts = [f.name for f in schema if any(test(f.type) for test in is_text)]
        raise WorkloadError(
            f"{path}: column {column} is {kind}, not text; of text are: {', '.join(texts) or 'none'}",
            "name the column of the text with --text-column",
        )
    return file


def read_piece(
    piece: Piece, *, val_fraction: float, column: str, skip_bad: bool
) -> Iterator[Text | Literal["bad", "empty"]]:
    """The texts of a piece in order. A row without text is "bad" where those are skipped, one of "" is "empty".

    Raises WorkloadError with the place of what is not UTF-8, or not text.
    """
    for segment in piece:
        if segment.kind == "demo":
            for play in load_plays():
                data = play.encode("ascii")
                at = find_split(data, val_fraction)
                yield Text("train", play[:at], at, ends=True)
                yield Text("val", play[at:], len(data) - at, ends=True)
        elif segment.kind == "text":
            yield from _read_text(segment, val_fraction)
        else:
            rows = _read_jsonl(segment, column) if segment.kind == "jsonl" else _read_parquet(segment, column)
            for place, value in rows:
                wrong = _what_is_wrong(value)
                if wrong and not skip_bad:
                    raise WorkloadError(
                        f"{segment.path}: {place}: {column} is {wrong}",
                        "--skip-bad leaves such rows out and counts them",
                    )
                if wrong:
                    yield "bad"
                elif not value:
                    yield "empty"
                else:
                    data = value.encode("utf-8")
                    yield Text(choose_split(data, val_fraction), value, len(data), ends=True)


def choose_split(text: bytes, val_fraction: float) -> Split:
    """Of a document, by its content: equal texts are on the same side, in every source and on every machine."""
    number = int.from_bytes(hashlib.blake2b(text.strip(), digest_size=8).digest(), "little")
    return "val" if number < val_fraction * 2**64 else "train"


def _what_is_wrong(value: object) -> str:
    if value is None:
        return "null"
    if not isinstance(value, str):
        return f"{value!r:.40}, not text"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"not Unicode: half a surrogate pair at character {error.start}"
    return ""


def _read_text(segment: Segment, val_fraction: float) -> Iterator[Text]:
    with segment.path.open("rb") as file:
        file.seek(segment.begin)
        data = file.read(segment.end - segment.begin)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WorkloadError(
            f"{segment.path}: not UTF-8 text: {error.reason} at byte {segment.begin + error.start}",
            "convert it: iconv -f latin1 -t utf-8 FILE",
        ) from error
    if "\r" in text:  # Windows' lines, and old Macs', become "\n"
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        data = text.encode("utf-8")
    if text:
        split = segment.split or choose_split(data, val_fraction)
        yield Text(split, text, len(data), segment.ends)


def _read_jsonl(segment: Segment, column: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of the field `column` of every line."""
    at = segment.begin
    with segment.path.open("rb") as file:
        file.seek(at)
        while at < segment.end:
            line = file.readline()
            if not line:
                raise WorkloadError(f"{segment.path}: was changed while it was read: it ends at byte {at}")
            if line.strip():
                try:
                    row = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise WorkloadError(
                        f"{segment.path}: not UTF-8 text: {error.reason} at byte {at + error.start}"
                    ) from error
                except ValueError as error:
                    raise WorkloadError(
                        f"{segment.path}: {_line_at(segment.path, at)} is not JSON: {error}",
                        "a .jsonl has one object a line",
                    ) from error
                if not isinstance(row, dict):
                    raise WorkloadError(
                        f"{segment.path}: {_line_at(segment.path, at)} is not an object but {type(row).__name__}"
                    )
                if column not in row:
                    raise WorkloadError(
                        f"{segment.path}: {_line_at(segment.path, at)} has no field {column}; it has: {', '.join(row)}",
                        "name the field of the text with --text-column",
                    )
                value = row[column]
                if value and isinstance(value, str) and value.isascii():
                    yield "", value  # nothing can be wrong with it
                else:
                    yield _line_at(segment.path, at) if _what_is_wrong(value) else "", value
            at += len(line)


def _line_at(path: Path, at: int) -> str:
    """The name of the line that begins at byte `at`; only worked out for errors."""
    lines = 1
    with path.open("rb") as file:
        while at > 0 and (part := file.read(min(at, 1 << 20))):
            lines += part.count(b"\n")
            at -= len(part)
    return f"line {lines}"


def _read_parquet(segment: Segment, column: str) -> Iterator[tuple[str, Any]]:
    file = _open_parquet(segment.path, column)
    arrow = load_library("pyarrow", segment.path.name)
    counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    starts = [0, *accumulate(counts)]
    first = bisect_right(starts, segment.begin) - 1
    groups = [i for i in range(first, len(counts)) if starts[i] < segment.end and counts[i]]
    row = starts[first]
    try:
        for batch in file.iter_batches(1024, row_groups=groups, columns=[column], use_threads=False):
            if row >= segment.end:
                break
            if row + batch.num_rows > segment.begin:
                low, high = max(0, segment.begin - row), min(batch.num_rows, segment.end - row)
                values = batch.column(0).slice(low, high - low).to_pylist()
                for i, value in enumerate(values, row + low):
                    yield f"row {i}", value
            row += batch.num_rows
    except UnicodeDecodeError as error:
        raise WorkloadError(
            f"{segment.path}: between rows {row} and {row + 1023}: {column} is not UTF-8: {error.reason}"
        ) from error
    except (arrow.ArrowException, OSError) as error:
        raise WorkloadError(
            f"{segment.path}: damaged after row {row}: {_first_line(error)}", "copy or download it again"
        ) from error


def load_plays() -> list[str]:
    """The plays in the package, ASCII."""
    packed = (resources.files("workload") / "assets" / "plays.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("ascii").split("\f")


def chunks(text: str, size: int) -> Iterator[str]:
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


@contextmanager
def _mapped(path: Path) -> Iterator[Buffer]:
    """The bytes of a file without reading them; nothing cannot be mapped."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            yield view


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
