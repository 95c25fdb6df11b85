"""Text to shards."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workload.data import load_meta, load_split
from workload.errors import WorkloadError
from workload.prepare import ShardWriter, chunks, find_shards, load_texts, prepare, split_text
from workload.tokenizer import decode, load_tokenizer

BREAKS = st.lists(
    st.sampled_from(["\n", "\n\n", " \n", "\r\n", " ", "  ", "word", "It's", "é", "12", ".", "\t"])
)


@settings(deadline=None, max_examples=300)
@given(BREAKS, st.integers(1, 12))
def test_pieces_have_the_tokens_of_the_whole(parts: list[str], size: int) -> None:
    text = "".join(parts)
    tokenizer = load_tokenizer("gpt2")
    pieces = list(chunks(text, size))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_long_text_is_cut_into_pieces_of_about_the_size() -> None:
    pieces = list(chunks("a line of text\n" * 1000, 100))
    assert len(pieces) > 100
    assert all(len(piece) <= 115 for piece in pieces)


@given(BREAKS, st.floats(0.01, 0.99))
def test_splits_are_the_whole_text_cut_between_lines(parts: list[str], fraction: float) -> None:
    text = "".join(parts)
    train, val = split_text(text, fraction)
    assert train + val == text
    if "\n" in train:
        assert train.endswith("\n")


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_the_demo_prepares_itself(tmp_path: Path, tokenizer: str) -> None:
    folder = find_shards("demo", tmp_path / "data", tokenizer=tokenizer, val_fraction=0.1)
    meta = load_meta(folder)
    train, val = (load_split(folder, split)[0] for split in ("train", "val"))
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"])
    made_with = load_tokenizer(tokenizer)
    plays = [play for _, play in load_texts("demo")]
    assert len(plays) == 8
    assert int((train == made_with.eot).sum()) == int((val == made_with.eot).sum()) == 8
    # every byte is in one of the splits, and in its place
    assert meta["train_bytes"] + meta["val_bytes"] == sum(len(play.encode()) for play in plays)  # type: ignore[operator]
    first = [decode(made_with, split[: list(split).index(made_with.eot)].tolist()) for split in (train, val)]
    assert "".join(first) == plays[0]
    assert 0.09 < meta["val_bytes"] / meta["train_bytes"] < 0.13  # type: ignore[operator]
    stamp = (folder / "meta.json").stat().st_mtime_ns
    assert find_shards("demo", tmp_path / "data", tokenizer=tokenizer, val_fraction=0.1) == folder
    assert (folder / "meta.json").stat().st_mtime_ns == stamp  # made once


def test_a_folder_of_texts_is_read_in_order_and_prepared_once(tmp_path: Path) -> None:
    source = tmp_path / "texts"
    (source / "b").mkdir(parents=True)
    (source / "b" / "2.md").write_text("second\n" * 20, encoding="utf-8")
    (source / "a.txt").write_text("first é\n" * 20, encoding="utf-8")
    (source / "ignored.bin").write_bytes(b"\xff")
    out = tmp_path / "shards"
    meta = prepare(str(source), out, tokenizer="bytes", val_fraction=0.5)
    assert json.loads((out / "meta.json").read_text())["text_sha256"] == meta["text_sha256"]
    eot = [load_tokenizer("bytes").eot]
    expected = list("first é\n".encode() * 10) + eot + list(b"second\n" * 10) + eot
    assert load_split(out, "train")[0].tolist() == load_split(out, "val")[0].tolist() == expected
    assert not list(tmp_path.glob(".*partial"))
    with pytest.raises(WorkloadError, match="exists and is not empty"):
        prepare(str(source), out, tokenizer="bytes", val_fraction=0.5)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def attempt(source: Path) -> str:
        with pytest.raises(WorkloadError) as caught:
            prepare(str(source), out, tokenizer="bytes", val_fraction=0.1)
        assert not out.exists()
        return caught.value.message

    assert "no such file" in attempt(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "no .txt or .md file" in attempt(tmp_path / "empty")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "not UTF-8 text: invalid continuation byte at byte 3" in attempt(tmp_path / "latin.txt")
    (tmp_path / "nothing.txt").write_text("")
    assert "no text for the train split" in attempt(tmp_path / "nothing.txt")


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "shards"
    prepare(str(text), out, tokenizer="bytes", val_fraction=0.1)
    assert find_shards(str(out), tmp_path / "unused", tokenizer="bytes", val_fraction=0.1) == out
    with pytest.raises(WorkloadError, match="holds tokens of bytes, but the run's tokenizer is gpt2"):
        find_shards(str(out), tmp_path / "unused", tokenizer="gpt2", val_fraction=0.1)
    (out / "meta.json").unlink()  # as llm.c makes them: GPT-2's tokens
    assert find_shards(str(out), tmp_path / "unused", tokenizer="gpt2", val_fraction=0.1) == out
    assert not (tmp_path / "unused").exists()


def test_shards_are_cut_at_their_limit(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", limit=4)
    for tokens in ([1, 2, 3], [], [4, 5, 6, 7, 8, 9], [10]):
        writer.add(tokens)
    assert writer.close() == 10
    assert [shard.tolist() for shard in load_split(tmp_path, "train")] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [9, 10],
    ]
