"""Text to shards: the same whatever the number of processes and whatever was interrupted."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from workload.__main__ import main
from workload.commands.prepare import Meter
from workload.data import load_meta, load_split, render_header
from workload.errors import WorkloadError
from workload.prepare import Seen, find_shards, prepare
from workload.sources import choose_split, load_plays
from workload.tokenizer import decode, load_tokenizer

# Small enough that a few hundred rows make many pieces and shards.
SMALL: dict[str, Any] = {"tokenizer": "bytes", "val_fraction": 0.2, "piece_bytes": 3000, "shard_tokens": 7000}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """400 documents in two files, a quarter of them copies of others; 37 kB."""
    documents = [f"document {i % 300}: {'words and more ' * (i % 300 % 13)}" for i in range(400)]
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, part in (("a", documents[:150]), ("b", documents[150:])):
        lines = "".join(json.dumps({"text": document}) + "\n" for document in part)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents(folder: Path, split: str, tokenizer: str = "bytes") -> list[str]:
    """Texts of a split, which all end with end-of-text."""
    made_with = load_tokenizer(tokenizer)
    tokens = np.concatenate(load_split(folder, split))
    *parts, rest = np.split(tokens, np.flatnonzero(tokens == made_with.eot) + 1)
    assert rest.size == 0
    return [decode(made_with, part[:-1].tolist()) for part in parts]


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
        assert not list(tmp_path.glob(".*")) or source.exists()
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


def test_documents_end_with_end_of_text_and_copies_stay_on_one_side(tmp_path: Path, rows: Path) -> None:
    meta = prepare(str(rows), tmp_path / "out", **SMALL)
    train, val = (documents(tmp_path / "out", split) for split in ("train", "val"))
    lines = "".join(path.read_text() for path in sorted(rows.iterdir())).splitlines()
    originals = [json.loads(line)["text"] for line in lines]
    assert train == [text for text in originals if choose_split(text.encode(), 0.2) == "train"]
    assert val == [text for text in originals if choose_split(text.encode(), 0.2) == "val"]
    assert set(train).isdisjoint(val)
    assert len(set(train) | set(val)) == 300
    assert (meta["train_documents"], meta["val_documents"]) == (len(train), len(val))
    assert meta["train_bytes"] == sum(map(len, train))
    assert meta["split_by"] == "document"
    assert len(load_split(tmp_path / "out", "train")) > 3


def test_processes_and_threads_change_nothing(tmp_path: Path, rows: Path) -> None:
    made = []
    for threads, piece_bytes in ((1, 3000), (2, 3000), (1, 10**6)):
        out = tmp_path / f"{threads}-{piece_bytes}"
        prepare(str(rows), out, **{**SMALL, "piece_bytes": piece_bytes, "threads": threads})
        files = read_folder(out)
        del files["meta.json"]
        made.append(files)
    assert made[0] == made[1] == made[2]


# Run in a process of its own, which forks: prepares once to the end, counting the moments at which a machine may stop
# (before and after every write, flush, fsync, rename and removal), then is killed at each of them and goes on.
KILLED = """
import os, random, signal, sys, shutil
from pathlib import Path
from workload import prepare as module, shards
from workload.prepare import prepare
source, scratch, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
SMALL = dict(tokenizer="bytes", val_fraction=0.2, piece_bytes=3000, shard_tokens=7000, journal_s=0.0)
moments = 0
kill_at = 0
def moment():
    global moments
    moments += 1
    if moments == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
def around(owner, name):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        moment()
        result = original(*args, **kwargs)
        moment()
        return result
    setattr(owner, name, wrapped)
around(shards.ShardWriter, "add")
around(shards.os, "fsync")
for name in ("replace", "rename", "unlink", "mkdir"):
    around(Path, name)
around(shutil, "rmtree")
prepare(source, scratch / "whole", **SMALL)
total, killed = moments, 0
for first in range(random.randint(1, total // rounds), total, total // rounds):
    out = scratch / "out"
    for kill in (first, 1 + first // 2, 0):  # killed, killed again while going on, then left alone
        child = os.fork()
        if not child:
            moments, kill_at = 0, kill
            meta = prepare(source, out, **SMALL)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        killed += os.WIFSIGNALED(status)
        assert status in (0, signal.SIGKILL), status
    same = {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in (scratch / "whole").iterdir()}
    assert same, first
    assert sorted(p.name for p in scratch.iterdir()) == ["out", "whole"], first
    shutil.rmtree(out)
print(total, killed)
"""


def test_a_kill_at_any_moment_costs_nothing(tmp_path: Path, rows: Path) -> None:
    """At a dozen of the moments there are, others each time; a round is two kills and an end."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(rows), str(scratch), "12"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    total, killed = map(int, done.stdout.split())
    assert total > 200
    assert killed >= 12


# As the command does, in small pieces, and slow enough to be hit.
SLOW = """
import sys, time
from pathlib import Path
from workload.prepare import prepare
def watch(seen):
    print(seen.tokens, flush=True)
    time.sleep(0.05)
prepare(sys.argv[1], Path(sys.argv[2]), tokenizer="bytes", val_fraction=0.2, piece_bytes=3000, shard_tokens=7000,
        threads=2, journal_s=0.0, note=lambda text: print(text, file=sys.stderr), watch=watch)
"""


def test_kill_9_of_a_command_with_processes(tmp_path: Path, rows: Path) -> None:
    whole, out, resumed = tmp_path / "whole", tmp_path / "out", 0
    prepare(str(rows), whole, **SMALL)
    for _ in range(3):
        command = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(rows), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert command.stdout is not None
        for _ in range(random.randint(2, 3)):
            command.stdout.readline()
        workers = children(command.pid)
        command.send_signal(signal.SIGKILL)
        _, said = command.communicate(timeout=60)  # ends when the workers have gone too: they hold the pipes
        resumed += "going on from" in said
        assert not out.exists()
        assert workers
        assert wait_until(lambda workers=workers: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert resumed >= 2
    meta = prepare(str(rows), out, **SMALL)
    assert meta == load_meta(whole)
    assert read_folder(out) == read_folder(whole)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def wait_until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# In a mount namespace of its own, with a disk of 64 kB that then gets room.
FULL = """
mount -t tmpfs -o size=64k tmpfs "$2"
"$1" -c "$4" "$3" "$2/out" > /dev/null && exit 3
find "$2" -name journal.json | grep -q . || exit 4
mount -o remount,size=10m "$2"
"$1" -c "$4" "$3" "$2/out" > /dev/null || exit 5
cp -r "$2/out" "$5"
"""


def test_a_full_disk_is_said_and_the_same_command_goes_on(tmp_path: Path, rows: Path) -> None:
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*space, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        [
            *space,
            "sh",
            "-c",
            FULL,
            "sh",
            sys.executable,
            str(tmp_path / "disk"),
            str(rows),
            SLOW,
            str(tmp_path / "copy"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "the disk is full (No space left on device; " in done.stderr
    assert "make room, and the same command goes on" in done.stderr
    assert "going on from" in done.stderr
    prepare(str(rows), tmp_path / "whole", **SMALL)
    assert read_folder(tmp_path / "copy") == read_folder(tmp_path / "whole")


def test_tokens_bounds_what_is_read(tmp_path: Path, rows: Path) -> None:
    for folder, source in (("a", rows), ("b", rows / "b.jsonl")):
        prepare(str(source), tmp_path / f"all-{folder}", **SMALL)
        read: list[float] = []
        meta = prepare(
            str(source),
            tmp_path / folder,
            tokens=8000,
            watch=lambda seen, read=read: read.append(seen.fraction),
            **SMALL,
        )
        train, val = (np.concatenate(load_split(tmp_path / folder, split)) for split in ("train", "val"))
        assert (len(train), meta["train_tokens"]) == (8000, 8000)
        assert 0 < len(val) <= 2000
        for split, part in (("train", train), ("val", val)):
            whole = np.concatenate(load_split(tmp_path / f"all-{folder}", split))
            assert np.array_equal(part, whole[: len(part)])
        assert meta["train_bytes"] == int((train != 256).sum())
        assert meta["train_documents"] == int((train == 256).sum())
        assert len(read) < 6  # not the whole source


def test_tokens_of_one_long_text_leave_its_end_for_validation(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a long text\n" for i in range(4000))
    (tmp_path / "x.txt").write_text(text)
    seen = []
    meta = prepare(str(tmp_path / "x.txt"), tmp_path / "out", tokens=5000, watch=seen.append, **SMALL)
    train, val = (np.concatenate(load_split(tmp_path / "out", split)) for split in ("train", "val"))
    assert (meta["train_tokens"], meta["val_tokens"]) == (5000, 1250)
    assert bytes(train.tolist()).decode() == text[:5000]
    assert text.endswith("\n") and bytes(val.tolist()).decode() in text[int(len(text) * 0.79) :]  # noqa: PT018
    assert len(seen) < 8


def test_a_stopped_command_goes_on(tmp_path: Path, rows: Path) -> None:
    prepare(str(rows), tmp_path / "whole", **SMALL)
    seen: list[Any] = []
    with pytest.raises(WorkloadError, match=r"stopped after [\d,]+ tokens, which are kept"):
        prepare(str(rows), tmp_path / "out", should_stop=lambda: len(seen) == 5, watch=seen.append, **SMALL)
    assert not (tmp_path / "out").exists()
    more: list[Any] = []
    notes: list[str] = []
    prepare(str(rows), tmp_path / "out", watch=more.append, note=notes.append, **SMALL)
    assert "going on from" in notes[0]
    assert more[0].tokens > seen[-1].tokens
    assert more[0].new < more[0].tokens
    assert [s.fraction for s in seen + more] == sorted(s.fraction for s in seen + more)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")


def stop_halfway(rows: Path, out: Path) -> Path:
    asked = iter(range(100))
    with pytest.raises(WorkloadError, match="stopped"):
        prepare(str(rows), out, should_stop=lambda: next(asked) == 7, **SMALL)
    return out.with_name(f".{out.name}.partial")


def test_going_on_with_other_settings_is_refused(tmp_path: Path, rows: Path) -> None:
    staging = stop_halfway(rows, tmp_path / "out")
    before = read_folder(staging)
    with pytest.raises(WorkloadError, match=r"other settings: val_fraction 0.2 → 0.3") as caught:
        prepare(str(rows), tmp_path / "out", **{**SMALL, "val_fraction": 0.3})
    assert f"rm -r {staging}" in caught.value.hint
    assert read_folder(staging) == before


def test_a_folder_that_only_lacks_its_name_is_for_its_request(tmp_path: Path, rows: Path) -> None:
    prepare(str(rows), tmp_path / "out", **SMALL)
    (tmp_path / "out").rename(tmp_path / ".out.partial")
    with pytest.raises(WorkloadError, match="is complete, for other settings"):
        prepare(str(rows), tmp_path / "out", **{**SMALL, "val_fraction": 0.3})
    prepare(str(rows), tmp_path / "out", **SMALL)


def test_a_source_that_changed_is_begun_again(tmp_path: Path, rows: Path) -> None:
    stop_halfway(rows, tmp_path / "out")
    (rows / "a.jsonl").write_text('{"text": "other"}\n')
    notes: list[str] = []
    prepare(str(rows), tmp_path / "out", note=notes.append, **SMALL)
    assert "has changed since: beginning again" in notes[0]
    assert documents(tmp_path / "out", choose_split(b"other", 0.2))[0] == "other"


def test_a_source_that_changes_while_it_is_read_or_after_is_said(tmp_path: Path, rows: Path) -> None:
    def change(_: object) -> None:
        os.utime(rows / "b.jsonl", ns=(0, 1))

    def cut(_: object) -> None:
        os.truncate(rows / "b.jsonl", 0)

    with pytest.raises(WorkloadError, match="was changed while it was read"):
        prepare(str(rows / "b.jsonl"), tmp_path / "out", watch=change, **SMALL)
    with pytest.raises(WorkloadError, match="was changed while it was read: it ends at byte"):
        prepare(str(rows / "b.jsonl"), tmp_path / "out", watch=cut, **SMALL)
    (rows / "b.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(300)))
    prepare(str(rows / "b.jsonl"), tmp_path / "out", **SMALL)
    assert len(documents(tmp_path / "out", "train")) > 200
    os.utime(rows / "b.jsonl", ns=(0, 0))
    with pytest.raises(WorkloadError, match="which has changed since"):
        prepare(str(rows / "b.jsonl"), tmp_path / "out", **SMALL)


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_what_was_finished_is_checked_before_going_on(
    tmp_path: Path, rows: Path, name: str, damage: str
) -> None:
    path = stop_halfway(rows, tmp_path / "out") / name
    content = bytearray(path.read_bytes())
    content[1030] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "changed" else content[:1100])
    with pytest.raises(WorkloadError) as caught:
        prepare(str(rows), tmp_path / "out", **SMALL)
    assert name in caught.value.message


def test_one_command_at_a_time_works_on_a_folder(tmp_path: Path, rows: Path) -> None:
    def again(_: object) -> None:
        with pytest.raises(WorkloadError, match="another command is at work there"):
            prepare(str(rows), tmp_path / "out", **SMALL)

    prepare(str(rows), tmp_path / "out", watch=again, **SMALL)


def test_rows_that_are_left_out_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [
        json.dumps({"text": None if i % 10 == 3 else "" if i % 10 == 7 else f"row {i}"}) for i in range(200)
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(WorkloadError, match="line 4: text is null"):
        prepare(str(path), tmp_path / "out", **SMALL)
    meta = prepare(str(path), tmp_path / "out", skip_bad=True, **SMALL)
    assert (meta["skipped"], meta["empty"]) == (20, 20)
    assert meta["train_documents"] + meta["val_documents"] == 160


def test_an_empty_validation_split_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n')
    side = choose_split(b"one", 0.2)
    with pytest.raises(WorkloadError, match=f"no text for the {'val' if side == 'train' else 'train'} split"):
        prepare(str(tmp_path / "x.jsonl"), tmp_path / "out", **SMALL)
    assert not list(tmp_path.glob(".*"))  # nothing to go on with


def test_tokens_of_a_tensor_are_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.random.default_rng(1).integers(0, 50256, 30_000).astype(np.int32)
    tokens[::100] = 50256
    save_file({"tokens": tokens}, tmp_path / "x.safetensors")
    out = tmp_path / "out"
    assert main(["prepare", str(tmp_path / "x.safetensors"), "--out", str(out)]) == 0
    train, val = (np.concatenate(load_split(out, split)) for split in ("train", "val"))
    assert np.array_equal(np.concatenate([train, val]), tokens)
    assert len(val) == pytest.approx(3000, abs=100)
    assert train[-1] == 50256
    assert load_meta(out)["val_documents"] == int((val == 50256).sum())
    tokens[12345] = 50257
    save_file({"tokens": tokens}, tmp_path / "x.safetensors")
    capsys.readouterr()
    assert main(["prepare", str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "other")]) == 1
    assert "token 50257 at position 12345; the vocabulary has 0 … 50256" in capsys.readouterr().err


def test_verify_reads_everything(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    prepare(str(rows), out, **SMALL)
    assert main(["prepare", str(out), "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(out.glob("*.bin")))
    assert all(line.endswith("as it was made") for line in lines)
    content = bytearray((out / "train_000001.bin").read_bytes())
    content[2000] ^= 1
    (out / "train_000001.bin").write_bytes(content)
    assert find_shards(str(out), tmp_path, tokenizer="bytes", val_fraction=0.1) == out  # sizes only
    assert main(["prepare", str(out), "--verify"]) == 1
    assert "train_000001.bin: sha256 is" in capsys.readouterr().err


def test_the_meter_tells_the_rate_of_this_command_and_the_time_that_is_left() -> None:
    for is_terminal in (False, True):
        stream = io.StringIO()
        stream.isatty = lambda is_terminal=is_terminal: is_terminal  # type: ignore[method-assign]
        times = iter((0.0, 0.1, 20.0, 20.1, 40.0))  # begun, then asked at each
        meter = Meter(stream, lambda times=times: next(times))  # type: ignore[misc]
        for now, fraction in ((0.1, 0.5), (20.0, 0.6), (20.1, 0.61), (40.0, 0.7)):
            meter(
                Seen(
                    fraction, 5000 + int(100 * now), int(100 * now), 0.5, "downloading x" if now == 40 else ""
                )
            )
        if is_terminal:
            assert stream.getvalue().startswith("\r 60.0%  7,000 tokens  100 tok/s  eta 1:20\x1b[K\r")
        else:
            assert stream.getvalue() == (
                " 60.0%  7,000 tokens  100 tok/s  eta 1:20\n 70.0%  9,000 tokens  100 tok/s  eta 1:00  downloading x\n"
            )


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["demo"], "--out is missing"),
        (["demo", "--out", str(tmp_path / "x"), "--val-fraction", "1.5"], "a fraction between 0 and 1"),
        ([str(tmp_path / "absent"), "--verify"], "there is no such folder"),
        (["hf:justaname", "--out", str(tmp_path / "x")], "not the name of a data set"),
    ):
        assert main(["prepare", *arguments]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["prepare", "demo", "--out", "x", "--tokens", "many"])
    assert "many is not a number of tokens; 1e9, 500M and 10B are" in capsys.readouterr().err


def test_a_run_refuses_shards_that_are_not_as_meta_json_says(tmp_path: Path, rows: Path) -> None:
    out = tmp_path / "out"

    def refused() -> str:
        with pytest.raises(WorkloadError) as caught:
            find_shards(str(out), tmp_path / "unused", tokenizer="bytes", val_fraction=0.1)
        return caught.value.message

    prepare(str(rows), out, **SMALL)
    first = (out / "train_000000.bin").read_bytes()
    (out / "train_000001.bin").rename(tmp_path / "elsewhere")
    assert "lists other files: missing train_000001.bin" in refused()
    (tmp_path / "elsewhere").rename(out / "train_000001.bin")
    (out / "train_000099.bin").write_bytes(first)
    assert "not listed train_000099.bin" in refused()
    (out / "train_000099.bin").unlink()
    (out / "train_000001.bin").write_bytes(render_header(2) + bytes(4))
    assert "train_000001.bin: 2 tokens, but meta.json says 7000" in refused()
    (out / "train_000001.bin").write_bytes(first[:5000])
    assert "it has 5000 bytes" in refused()


def test_folders_of_others_are_searched_for_foreign_tokens(tmp_path: Path) -> None:
    out = tmp_path / "nano"
    out.mkdir()
    for split in ("train", "val"):
        np.arange(1, 301, dtype="<u2").tofile(out / f"{split}.bin")
    find = {"tokenizer": "gpt2", "val_fraction": 0.1}
    assert find_shards(str(out), tmp_path / "unused", **find) == out  # type: ignore[arg-type]
    np.array([1, 2, 50257, 3] * 9, "<u2").tofile(out / "val.bin")
    with pytest.raises(WorkloadError, match=r"val.bin: token 50257 at position 2"):
        find_shards(str(out), tmp_path / "unused", **find)  # type: ignore[arg-type]
    (out / "val.bin").write_bytes(b"")
    with pytest.raises(WorkloadError, match="0 tokens: the validation split is empty"):
        find_shards(str(out), tmp_path / "unused", **find)  # type: ignore[arg-type]
    (out / "val.bin").unlink()
    with pytest.raises(WorkloadError, match=r"no val_\*.bin: the validation split is empty"):
        find_shards(str(out), tmp_path / "unused", **find)  # type: ignore[arg-type]
    (out / "meta.pkl").write_bytes(b"")
    with pytest.raises(WorkloadError, match="nanoGPT's tokens of single characters"):
        find_shards(str(out), tmp_path / "unused", **find)  # type: ignore[arg-type]


def test_a_run_does_not_download_by_itself(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="fineweb-10b must be downloaded first"):
        find_shards("fineweb-10b", tmp_path / "data", tokenizer="gpt2", val_fraction=0.1)


def test_a_process_that_dies_is_said(tmp_path: Path, rows: Path) -> None:
    def kill_a_worker(_: object) -> None:
        for pid in children(os.getpid()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended since it was listed
                if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)

    with pytest.raises(WorkloadError, match="a process that was making tokens has ended"):
        prepare(str(rows), tmp_path / "out", watch=kill_a_worker, threads=2, **SMALL)
    prepare(str(rows), tmp_path / "whole", **SMALL)
    prepare(str(rows), tmp_path / "out", **SMALL)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")
