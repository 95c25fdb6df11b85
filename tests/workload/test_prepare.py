"""Text to shards."""

import json
from pathlib import Path

import pytest

from workload.data import load_meta, load_split
from workload.errors import WorkloadError
from workload.prepare import find_shards, prepare
from workload.sources import load_plays
from workload.tokenizer import decode, load_tokenizer


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_the_demo_prepares_itself(tmp_path: Path, tokenizer: str) -> None:
    folder = find_shards("demo", tmp_path / "data", tokenizer=tokenizer, val_fraction=0.1)
    meta = load_meta(folder)
    train, val = (load_split(folder, split)[0] for split in ("train", "val"))
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"])
    made_with = load_tokenizer(tokenizer)
    plays = load_plays()
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
    assert json.loads((out / "meta.json").read_text()) == meta
    eot = [load_tokenizer("bytes").eot]
    expected = list("first é\n".encode() * 10) + eot + list(b"second\n" * 10) + eot
    assert load_split(out, "train")[0].tolist() == load_split(out, "val")[0].tolist() == expected
    assert not list(tmp_path.glob(".*partial"))
    stamps = [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
    assert prepare(str(source), out, tokenizer="bytes", val_fraction=0.5) == meta  # complete: only looked at
    assert [path.stat().st_mtime_ns for path in sorted(out.iterdir())] == stamps
    with pytest.raises(WorkloadError, match="exists and is not empty"):
        prepare(str(source), out, tokenizer="bytes", val_fraction=0.4)


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
    assert "not UTF-8 text: unexpected end of data at byte 3" in attempt(tmp_path / "latin.txt")
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
