"""How sources are cut: nothing lost, nothing in both splits, tokens those of the whole."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from workload.errors import WorkloadError
from workload.sources import (
    MANY_TEXTS,
    Source,
    SourceFile,
    Text,
    choose_split,
    choose_training_files,
    chunks,
    find_cuts,
    find_split,
    open_local,
    plan,
    read_piece,
)
from workload.tokenizer import load_tokenizer

BREAKS = st.lists(
    st.sampled_from(
        [
            "\n",
            "\n\n",
            " \n",
            "\r\n",
            " ",
            "  ",
            "word",
            "It's",
            "é",
            "12",
            ".",
            "\t",
            "\u00a0",
            "\u3000",
            "\u2028",
            *("日本", "か", "\x85", " a b c", "\u200b", "😀", "\x1c", "ﬁ"),
        ]
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=300)
@given(BREAKS, st.integers(1, 12))
def test_pieces_have_the_tokens_of_the_whole(parts: list[str], size: int) -> None:
    text = "".join(parts)
    tokenizer = load_tokenizer("gpt2")
    pieces = list(chunks(text, size))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in tokenizer.encode(piece)] == tokenizer.encode(text)


@settings(deadline=None, max_examples=300)
@given(BREAKS, st.integers(1, 12))
def test_bytes_are_cut_where_the_tokens_are_those_of_the_whole(parts: list[str], size: int) -> None:
    data = "".join(parts).encode()
    cuts = [0, *find_cuts(data, 0, len(data), size), len(data)]
    assert cuts == sorted(cuts)
    tokenizer = load_tokenizer("gpt2")
    pieces = [data[a:b].decode() for a, b in pairwise(cuts)]
    assert [t for piece in pieces for t in tokenizer.encode(piece)] == tokenizer.encode(data.decode())
    # as a text is read: Windows' lines are made "\n" part by part
    unix = [piece.replace("\r\n", "\n") for piece in pieces]
    assert "".join(unix) == data.decode().replace("\r\n", "\n")
    assert [t for piece in unix for t in tokenizer.encode(piece)] == tokenizer.encode("".join(unix))


@pytest.mark.parametrize(
    "line", ["a line of text\n", "a line of text\r\n", "一行文字。二\n", "words and more "]
)
def test_long_text_is_cut_into_pieces_of_about_the_size(line: str) -> None:
    data = (line * 1000).encode()
    cuts = list(find_cuts(data, 0, len(data), 100))
    assert len(cuts) > len(data) // 130
    assert len(list(chunks("a line of text\n" * 1000, 100))) > 100


@given(BREAKS, st.floats(0.01, 0.99))
def test_a_text_is_split_between_lines_or_at_least_characters(parts: list[str], fraction: float) -> None:
    data = "".join(parts).encode()
    at = find_split(data, fraction)
    train, val = data[:at].decode(), data[at:].decode()  # whole characters
    assert (train + val).encode() == data
    if "\n" in train:
        assert train.endswith("\n")


def read(source: Source, **changes: Any) -> list[Text]:
    """All texts of a source, planned in small pieces."""
    options = {"val_fraction": 0.3, "column": "text", "skip_bad": False, "piece_bytes": 100, **changes}
    piece_bytes, skip_bad = options.pop("piece_bytes"), options.pop("skip_bad")
    assert source.folder is not None
    found: list[Text] = []
    for unit in source.units(piece_bytes):
        paths = [source.folder / file.name for file in unit]
        for piece in plan(source, paths, eot=50256, piece_bytes=piece_bytes, **options):
            found += [t for t in read_piece(piece, skip_bad=skip_bad, **options) if isinstance(t, Text)]
    return found


def save_rows(path: Path, rows: Sequence[object], **options: Any) -> Path:
    """Rows of a column "text" as jsonl or as real parquet."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, "text": row}) + "\n" for row in rows), encoding="utf-8")
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": [1] * len(rows), "text": rows}), path, **options)
    return path


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), max_size=60),
    group=st.integers(1, 50),
    piece=st.integers(20, 4000),
    kind=st.sampled_from(["jsonl", "parquet"]),
)
def test_every_row_is_read_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], group: int, piece: int, kind: str
) -> None:
    path = tmp_path_factory.mktemp("rows") / f"x.{kind}"
    save_rows(path, rows, **({"row_group_size": group} if kind == "parquet" else {}))
    texts = read(open_local(str(path)), piece_bytes=piece)
    assert [text.text for text in texts] == rows
    assert all(text.ends and text.n_bytes == len(text.text.encode()) for text in texts)


def test_a_large_row_group_is_shared_by_pieces(tmp_path: Path) -> None:
    rows = [f"{i} {'x' * 50}" for i in range(200)]
    source = open_local(str(save_rows(tmp_path / "x.parquet", rows, row_group_size=1000)))
    pieces = list(
        plan(source, [tmp_path / "x.parquet"], val_fraction=0.1, column="text", eot=0, piece_bytes=200)
    )
    assert len(pieces) > 10
    assert [t.text for t in read(source, piece_bytes=200)] == rows


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.sampled_from(["", " ", "\n", "\r\n\t"])
)
def test_a_copy_of_a_document_goes_where_the_original_went(text: str, space: str) -> None:
    assert choose_split((space + text + space).encode(), 0.5) == choose_split(text.encode(), 0.5)


def test_documents_are_split_in_proportion() -> None:
    sides = [choose_split(f"document {i}".encode(), 0.1) for i in range(10000)]
    assert 900 < sides.count("val") < 1100
    assert all(choose_split(f"{i}".encode(), 1e-9) == "train" for i in range(1000))


def test_few_texts_are_split_within_and_many_by_document(tmp_path: Path) -> None:
    for i in range(MANY_TEXTS - 1):
        (tmp_path / f"{i:04d}.txt").write_text(f"{i} one\n{i} two\n{i} three\n")
    few = read(open_local(str(tmp_path)), val_fraction=0.4)
    assert [t.split for t in few] == ["train", "val"] * (MANY_TEXTS - 1)
    (tmp_path / "last.md").write_text("the last\n")
    many = read(open_local(str(tmp_path)), val_fraction=0.4)
    assert [t.text for t in many] == [
        path.read_text() for path in sorted(tmp_path.iterdir())
    ]  # whole, in order of path
    assert 40 < [t.split for t in many].count("val") < 120


def test_rows_beside_texts_make_all_of_them_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("whole\n" * 9)
    save_rows(tmp_path / "b.jsonl", ["row"])
    assert [t.text for t in read(open_local(str(tmp_path)))] == ["whole\n" * 9, "row"]


def test_windows_lines_become_plain_ones(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"one\r\ntwo\rthree\r\n" * 30)
    texts = read(open_local(str(tmp_path / "x.txt")))
    assert len(texts) > 3
    assert "".join(t.text for t in texts) == "one\ntwo\nthree\n" * 30
    assert sum(t.n_bytes for t in texts) == 14 * 30


def test_only_the_split_train_of_a_data_set_is_read() -> None:
    def choose(*names: str) -> list[str]:
        return [file.name for file in choose_training_files([SourceFile(name, 1, "") for name in names])]

    assert choose("data/train-0.parquet", "data/test-0.parquet", "data/validation-0.parquet") == [
        "data/train-0.parquet"
    ]
    assert choose("train.jsonl", "dev.jsonl", "more.jsonl") == ["train.jsonl", "more.jsonl"]
    assert choose("000_00000.parquet", "test.parquet") == ["000_00000.parquet", "test.parquet"]
    assert choose("train.txt", "test.txt") == ["train.txt", "test.txt"]  # texts have names of their own


def complaint(source: Path, **changes: Any) -> str:
    with pytest.raises(WorkloadError) as caught:
        read(open_local(str(source)), **changes)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_without_text_are_named_and_left_out_on_demand(tmp_path: Path, kind: str) -> None:
    path = save_rows(tmp_path / f"x.{kind}", ["a", "é" * 200, "", None, "b"])
    place = {"jsonl": "line 4", "parquet": "row 3"}[kind]
    assert f"{place}: text is null\n--skip-bad leaves" in complaint(path)
    assert [t.text for t in read(open_local(str(path)), skip_bad=True)] == ["a", "é" * 200, "b"]


def test_nan_and_numbers_in_jsonl_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": NaN}\n')
    assert "line 3: text is nan, not text" in complaint(path)
    path.write_text('{"text": "\\ud83d"}\n')
    assert "line 1: text is not Unicode: half a surrogate pair at character 0" in complaint(path)
    path.write_text('{"text": "a"}\n{"text": \n')
    assert "line 2 is not JSON" in complaint(path)
    path.write_text("[1]\n")
    assert "line 1 is not an object but list" in complaint(path)
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert "not UTF-8 text: invalid continuation byte at byte 27" in complaint(path)
    path.write_text('{"title": "a", "body": "b"}\n')
    assert "line 1 has no field text; it has: title, body" in complaint(path)
    assert [t.text for t in read(open_local(str(path)), column="body")] == ["b"]


def test_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    path = save_rows(tmp_path / "x.parquet", ["a"])
    assert "there is no column body; it has: id, text" in complaint(path, column="body")
    assert "column id is int64, not text; of text are: text" in complaint(path, column="id")


def test_parquet_that_is_cut_or_damaged_is_refused(tmp_path: Path) -> None:
    path = save_rows(tmp_path / "x.parquet", [f"row {i} {'x' * i}" for i in range(2000)], compression="zstd")
    whole = path.read_bytes()
    for cut in (whole[:-100], whole[: len(whole) // 2], b"", b"PAR1"):
        path.write_bytes(cut)
        assert "not a whole parquet file" in complaint(path)
    damaged = bytearray(whole)
    damaged[4:2000] = bytes(1996)
    path.write_bytes(bytes(damaged))
    assert f"{path}: damaged after row 0" in complaint(path)


def test_a_column_of_categories_or_large_text_is_text(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        column = pyarrow.array(["a", "b", "a"]).cast(kind)
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
        assert [t.text for t in read(open_local(str(tmp_path / "x.parquet")))] == ["a", "b", "a"]


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_rows(tmp_path / "x.parquet", ["a"])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)  # as where it is not installed
    said = complaint(path)
    assert "x.parquet needs pyarrow, which cannot be loaded" in said
    assert "pip install 'metal-to-model[data]'" in said


def test_text_that_is_not_utf8_is_named_with_its_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"a line of text\n" * 50 + b"caf\xe9\n" + b"a line of text\n" * 50)
    assert f"{path}: not UTF-8 text: invalid continuation byte at byte 753" in complaint(path)


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in complaint(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "no .txt or .md file" in complaint(tmp_path / "empty")
    (tmp_path / "x.bin").write_bytes(b"\0")
    assert ".bin is not read" in complaint(tmp_path / "x.bin")


def test_tokens_are_split_between_documents(tmp_path: Path) -> None:
    tokens = np.arange(1, 1001, dtype=np.int64)
    tokens[[100, 650, 900]] = 50256
    save_file({"tokens": tokens}, tmp_path / "x.safetensors")
    source = open_local(str(tmp_path / "x.safetensors"))
    pieces = list(
        plan(source, [tmp_path / "x.safetensors"], val_fraction=0.3, column="", eot=50256, piece_bytes=500)
    )
    segments = [segment for piece in pieces for segment in piece]
    assert segments[0].begin == 0
    assert segments[-1].end == 1000
    assert all(a.end == b.begin for a, b in pairwise(segments))
    assert {s.split for s in segments if s.begin >= 651} == {"val"}
    assert {s.split for s in segments if s.end <= 651} == {"train"}
