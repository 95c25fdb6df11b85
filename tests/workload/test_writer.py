"""Written in the background: what was asked for, one at a time, and errors that are heard."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.workload.conftest import raise_at
from tests.workload.test_checkpoint import CONFIG, state_of
from workload import checkpoint
from workload.__main__ import main
from workload.checkpoint import find, list_complete, load
from workload.errors import WorkloadError
from workload.metrics import load_rows
from workload.writer import Writer

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Gate:
    """Holds every write of tensors until it is opened, and counts how many are inside at once."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.inside = self.most = 0
        self._save_file = checkpoint.save_file

    def __call__(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.set()
        assert self.open.wait(60)
        self._save_file(tensors, path)
        self.inside -= 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(checkpoint, "save_file", gate)
    yield gate
    gate.open.set()


def save(writer: Writer, step: int, tensor: Tensor | None = None, **options: object) -> None:
    weights = torch.full((3, 2), float(step)) if tensor is None else tensor
    random = {"cpu": torch.get_rng_state()}
    writer.save(CONFIG, state_of(step), model={"a": weights}, optimizer={}, random=random, **options)  # type: ignore[arg-type]


def test_what_changes_after_the_call_is_not_in_the_checkpoint(tmp_path: Path, gate: Gate) -> None:
    weights = torch.arange(12.0).reshape(3, 4).T  # not contiguous, as a slice of something larger may be
    before = weights.clone()
    with Writer(tmp_path, keep=9, keep_every=0) as writer:
        save(writer, 1, weights)
        assert gate.entered.wait(60)
        weights += 100  # the next update, while the first file is being written
        assert list_complete(tmp_path) == []
        gate.open.set()
        save(writer, 2, weights)  # the same memory takes the next copy, after the first is written
    assert torch.equal(load(tmp_path / "step-00000001").model["a"], before)
    assert torch.equal(load(tmp_path / "step-00000002").model["a"], before + 100)


def test_one_at_a_time_and_a_long_wait_is_told(tmp_path: Path, gate: Gate) -> None:
    notes: list[str] = []
    now = iter([0.0, 0.1, 10.0, 13.5])
    with Writer(tmp_path, keep=9, keep_every=0, note=notes.append, clock=lambda: next(now)) as writer:
        save(writer, 1)
        assert gate.entered.wait(60)
        threading.Timer(0.1, gate.open.set).start()
        save(writer, 2)
        assert list_complete(tmp_path) == [tmp_path / "step-00000001"]  # it waited
    assert gate.most == 1
    assert [path.name[-1] for path in list_complete(tmp_path)] == ["1", "2"]
    assert len(notes) == 1
    assert notes[0].startswith("step 2: waited 3.5 s until the checkpoint before was written")


def test_best_is_named_once_it_is_complete_and_nothing_needed_is_pruned(tmp_path: Path, gate: Gate) -> None:
    with Writer(tmp_path, keep=1, keep_every=4) as writer:
        save(writer, 1)
        assert gate.entered.wait(60)
        writer.point_best(1)
        assert not (tmp_path / "best").exists()
        gate.open.set()
        for step in range(2, 7):
            save(writer, step)
    assert (tmp_path / "best").read_text() == "step-00000001\n"
    assert (tmp_path / "latest").read_text() == "step-00000006\n"
    assert [int(path.name[-1]) for path in list_complete(tmp_path)] == [1, 4, 6]


def test_the_last_good_one_is_there_while_the_next_is_written(tmp_path: Path, gate: Gate) -> None:
    with Writer(tmp_path, keep=1, keep_every=0) as writer:
        gate.open.set()
        save(writer, 1)
        writer.wait()
        gate.open.clear()
        gate.entered.clear()
        save(writer, 2)
        assert gate.entered.wait(60)
        assert load(find(tmp_path, "latest")).state.step == 1
        assert (tmp_path / ".step-00000002.partial").is_dir()
        gate.open.set()
    assert [path.name[-1] for path in list_complete(tmp_path)] == ["2"]


def test_a_write_that_fails_is_heard_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    with Writer(folder, keep=2, keep_every=0) as writer:
        save(writer, 1)
        writer.wait()
        with monkeypatch.context() as patch:

            def full(tensors: Mapping[str, Tensor], path: Path) -> None:
                path.write_bytes(b"some of it")
                raise NO_SPACE

            patch.setattr(checkpoint, "save_file", full)
            save(writer, 2)
            writer.point_best(2)
            with pytest.raises(WorkloadError, match="checkpoint of step 2 could not be written") as caught:
                writer.wait()
        assert "No space left on device" in caught.value.message
        assert "MB are free" in caught.value.message
        assert "the newest complete one is step-00000001" in caught.value.hint
        assert f"--resume --out {tmp_path}" in caught.value.hint
        assert {path.name for path in folder.iterdir()} == {"step-00000001", "latest"}
        assert load(find(folder, "latest")).state.step == 1
        save(writer, 2)  # there is room again
    assert load(find(folder, "latest")).state.step == 2


def test_an_error_is_heard_without_asking_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise NO_SPACE

    monkeypatch.setattr(checkpoint, "save_file", fail)
    writer = Writer(tmp_path, keep=2, keep_every=0)
    save(writer, 1)
    writer._thread.shutdown(wait=True)
    with pytest.raises(WorkloadError, match="step 1 could not be written"):
        writer.check()
    writer.check()  # once is enough
    notes: list[str] = []
    with pytest.raises(WorkloadError, match="step 2"), Writer(tmp_path, keep=2, keep_every=0) as writer:
        save(writer, 2)

    def end_otherwise() -> None:
        with Writer(tmp_path, keep=2, keep_every=0, note=notes.append) as writer:
            save(writer, 3)
            raise KeyError

    with pytest.raises(KeyError):  # what ended the run is not hidden by it
        end_otherwise()
    assert "step 3 could not be written" in notes[0]


def fail_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> Callable[[], int]:
    """The nth operation on the file system fails as on a full or broken disk. Returns the counter."""
    return raise_at(monkeypatch, nth, NO_SPACE)


def test_an_error_in_any_phase_is_readable_and_costs_nothing_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows"
    rows.write_text("x")

    def save_and_point(folder: Path) -> None:
        with Writer(folder, keep=1, keep_every=0) as writer:
            save(writer, 3, beside=[rows])
            writer.wait()
            writer.point_best(3)

    before = tmp_path / "before"
    with Writer(before, keep=2, keep_every=0) as writer:
        save(writer, 1)
        save(writer, 2)
        writer.point_best(1)

    def prepared(name: str) -> Path:
        return Path(shutil.copytree(before, tmp_path / name))

    whole = prepared("whole")
    with monkeypatch.context() as patch:
        operations = fail_at(patch, nth=0)
        save_and_point(whole)
        total = operations()
    assert total > 20
    assert [path.name[-1] for path in list_complete(whole)] == ["3"]
    for nth in range(1, total + 1):
        folder = prepared(f"error-{nth}")
        with monkeypatch.context() as patch:
            fail_at(patch, nth)
            with pytest.raises(WorkloadError, match="No space left on device"):
                save_and_point(folder)
        assert load(list_complete(folder)[-1]).state.step >= 2
        load(find(folder, "best"))
        load(find(folder, "latest"))
        assert not list(folder.glob(".step-*"))
        save_and_point(folder)
        assert {path.name for path in folder.iterdir()} == {"step-00000003", "latest", "best"}


@pytest.fixture
def signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


FULL = """
import resource, sys
from workload import train
from workload.__main__ import main
update = train.Run.update
def update_on_a_full_disk(run):
    if run.state.step == 5:  # from here on no file can be longer: the write fails in the middle, as on a full disk
        run.writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    update(run)
train.Run.update = update_on_a_full_disk
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("limit", "complaint"),
    [(9000, "the checkpoint of step 8 could not be written below "), (400, "step 6: ")],
    ids=["tensors", "rows"],
)
def test_a_disk_that_fills_up_costs_no_more_than_the_steps_since_the_last_checkpoint(
    tmp_path: Path, text: Path, limit: int, complaint: str, signals_as_before: None
) -> None:
    out = tmp_path / "run"
    command = ["train", "--out", str(out), "--device", "cpu", "--dtype", "fp32", "--threads", "1", "--set"]
    command += [
        f"source={text}",
        *["tokenizer=bytes", "n_layer=1", "n_head=2", "n_embd=16", "n_ctx=16", "batch=2"],
    ]
    command += ["micro_batch=2", "max_seconds=0", "eval_every=100", "eval_sequences=2", "sample_tokens=0"]
    command += ["save_every=4", "steps=12"]
    child = subprocess.run(
        [sys.executable, "-c", FULL, str(limit), *command],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert child.returncode == 1, child.stderr
    assert f"error: {complaint}" in child.stderr
    assert "File too large" in child.stderr
    assert "Traceback" not in child.stderr
    assert "step-00000004; make room, then: python -m workload train --resume --out" in child.stderr
    folder = out / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step-00000004", "latest"}
    assert load(find(folder, "latest")).state.step == 4
    if limit == 400:  # once is enough: there is room again
        assert main(["train", "--out", str(out), "--resume", "--device", "cpu", "--threads", "1"]) == 0
        steps = [row["step"] for row in load_rows(out / "metrics.jsonl") if row["kind"] == "step"]
        assert steps == list(range(1, 13))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_gpu_is_of_the_moment_of_the_call(tmp_path: Path) -> None:
    weights = torch.zeros(1 << 26, device="cuda")
    with Writer(tmp_path, keep=9, keep_every=0) as writer:
        for step in range(1, 4):
            weights += 1
            save(writer, step, weights)
            for _ in range(50):
                weights *= 2  # queued behind the copy
            weights.fill_(step)
    for step in range(1, 4):
        assert torch.equal(
            load(tmp_path / f"step-{step:08d}").model["a"], torch.full((1 << 26,), float(step))
        )
