"""The loop: it learns, and an interruption changes nothing."""

import dataclasses
import io
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workload.conftest import TINY
from workload import train as module
from workload.checkpoint import State, list_complete, load
from workload.config import Config, TrainConfig, load_config
from workload.errors import WorkloadError
from workload.files import only_one
from workload.metrics import TIMING, load_rows
from workload.model import GPT2
from workload.optim import make_optimizer
from workload.progress import Reporter
from workload.runs import save_config
from workload.train import Run, open_run, train

CPU = torch.device("cpu")


def reporter() -> Reporter:
    return Reporter(io.StringIO(), lambda: 0.0, 1)


def run(config: Config, out: Path, **options: Any) -> State:
    return train(config, out, device=CPU, dtype=torch.float32, reporter=reporter(), **options)


def opened(config: Config, out: Path) -> Run:
    return open_run(
        config, out, device=CPU, dtype=torch.float32, threads=1, clock=lambda: 0.0, reporter=reporter()
    )


def with_train(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def outcome(out: Path) -> dict[str, Any]:
    """Everything of a run that may not depend on when it was interrupted."""
    rows = [{k: v for k, v in row.items() if k not in TIMING} for row in load_rows(out / "metrics.jsonl")]
    files = {
        f"{path.name}/{name}.safetensors": (path / f"{name}.safetensors").read_bytes()
        for path in list_complete(out / "checkpoints")
        for name in ("model", "optimizer", "random")
    }
    states = [load(path).state for path in list_complete(out / "checkpoints")]
    kept = [dataclasses.replace(state, elapsed_s=0.0, metrics_bytes=0) for state in states]
    pointers = {name: (out / "checkpoints" / name).read_text() for name in ("latest", "best")}
    return {"rows": rows, "files": files, "states": kept, "pointers": pointers}


def test_one_batch_is_learned_by_heart() -> None:
    torch.manual_seed(0)
    model = GPT2(dataclasses.replace(TINY, n_embd=64))
    optimizer = make_optimizer(model, TrainConfig(lr=1e-2, weight_decay=0.0))
    ids = torch.randint(0, 257, (4, 17))
    for _ in range(150):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # the first token of each row says which row it is, so nothing is left to chance
    assert loss.item() < 0.05


def test_a_run_learns_and_writes_what_it_says(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    state = run(with_train(config, steps=60, eval_every=20, save_every=10, keep_every=30), out)
    rows = list(load_rows(out / "metrics.jsonl"))
    losses = [row["val_loss"] for row in rows if row["kind"] == "eval"]
    assert losses[0] == pytest.approx(5.55, abs=0.1)
    assert losses[-1] < 3.0
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 61))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 20, 40, 60]
    assert [row["tokens"] for row in rows if row["kind"] == "step"][-1] == 60 * 4 * 16
    assert len([row for row in rows if row["kind"] == "sample"]) == 4
    assert (state.step, state.steps, state.sequences) == (60, 60, 240)
    assert state.best_val_loss == min(losses)
    assert [int(path.name[-2:]) for path in list_complete(out / "checkpoints")] == [30, 50, 60]
    assert {"config.toml", "metrics.jsonl", "report.html", "starts.jsonl", "checkpoints", "data"} == {
        path.name for path in out.iterdir()
    }


def test_bits_per_byte_of_bytes_are_the_loss_in_bits(config: Config, tmp_path: Path) -> None:
    run(with_train(config, steps=1), tmp_path / "run")
    row = next(row for row in load_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "eval")
    # these windows hold no end-of-text, so a token is a byte
    assert row["val_bits_per_byte"] == pytest.approx(row["val_loss"] / 0.6931471805599453)


KILLED = """
import os, signal, sys, io
from pathlib import Path
import torch
from workload import checkpoint, train
from workload.config import parse_config
from workload.progress import Reporter
torch.set_num_threads(1)
where, out = sys.argv[1], Path(sys.argv[2])
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
update, save_file, evaluate = train.Run.update, checkpoint.save_file, train.Run._score
def update_or_die(run):
    if where == "update" and run.state.step == 6:
        run.writer.wait()
        kill()
    update(run)
def save_or_die(tensors, path):
    if where == "save" and "00000008" in str(path) and "optimizer" in str(path):
        kill()
    save_file(tensors, path)
def evaluate_or_die(run, should_stop):
    if where == "evaluate" and run.state.step == 8:
        run.writer.wait()
        kill()
    return evaluate(run, should_stop)
train.Run.update, checkpoint.save_file, train.Run._score = update_or_die, save_or_die, evaluate_or_die
config = parse_config((out / "config.toml").read_text(), where="config.toml")
train.train(config, out, device=torch.device("cpu"), dtype=torch.float32,
            reporter=Reporter(io.StringIO(), lambda: 0.0, 1))
"""


@pytest.mark.parametrize(("where", "resumed_from"), [("update", 4), ("save", 4), ("evaluate", 8)])
def test_kill_and_resume_is_the_same_as_no_kill(
    config: Config, tmp_path: Path, where: str, resumed_from: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(config, whole)
    save_config(killed, config)
    child = subprocess.run([sys.executable, "-c", KILLED, where, str(killed)], timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL
    assert list_complete(killed / "checkpoints")[-1].name == f"step-{resumed_from:08d}"
    rows = list(load_rows(killed / "metrics.jsonl"))
    assert rows[-1]["step"] > 4  # there is work to be lost
    assert run(config, killed).step == 12
    starts = [json.loads(line)["from_step"] for line in (killed / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, resumed_from]
    assert outcome(killed) == outcome(whole)


def test_a_folder_is_trained_in_by_one_at_a_time(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config, out)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    with only_one(out), pytest.raises(WorkloadError, match="another command is at work"):
        run(with_train(config, steps=20), out)
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before
    assert run(with_train(config, steps=20), out).step == 20  # the lock goes with who holds it


def test_what_fails_inside_of_a_locked_folder_is_told_as_it_is(tmp_path: Path) -> None:
    """Output to a terminal that does not block, for one: that is no second training."""
    with pytest.raises(BlockingIOError), only_one(tmp_path):
        raise BlockingIOError


def test_every_stop_and_resume_is_the_same_as_no_stop(config: Config, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    # checkpoints that a stop adds would be pruned at another time: keep all, and compare those of the plan
    config = with_train(config, keep=99)
    run(config, whole)

    def stop_after(calls: int) -> Callable[[], bool]:
        asked = iter(range(calls))
        return lambda: next(asked, None) is None

    starts, stop = 0, stop_after(0)
    while starts == 0 or stop():
        starts += 1
        stop = stop_after(3 * starts)
        step = run(config, stopped, should_stop=stop).step
        assert [path.name for path in list_complete(stopped / "checkpoints")][-1:] == [f"step-{step:08d}"] * (
            step > 0
        )
    assert starts > 4
    expected, seen = outcome(whole), outcome(stopped)
    assert seen["rows"] == expected["rows"]
    assert seen["pointers"] == expected["pointers"]
    assert expected["files"].items() <= seen["files"].items()


def test_what_dropout_draws_matters_to_the_test_above(config: Config, tmp_path: Path) -> None:
    run(with_train(config, steps=4), tmp_path / "run")
    state = load(list_complete(tmp_path / "run" / "checkpoints")[-1])
    model = GPT2(config.model)
    model.load_state_dict(state.model)
    ids = torch.zeros(1, 8, dtype=torch.long)
    assert not torch.equal(model(ids), model(ids))


def test_accumulation_changes_nothing(config: Config, tmp_path: Path) -> None:
    model = dataclasses.replace(config.model, dropout=0.0)
    gradients = []
    for micro_batch in (1, 2, 8):
        changed = with_train(dataclasses.replace(config, model=model), batch=8, micro_batch=micro_batch)
        this = opened(changed, tmp_path / str(micro_batch))
        with this.metrics:
            loss, norm = this._accumulate()
        gradients.append((loss, norm, [p.grad for p in this.model.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-7)


def test_gradients_are_clipped_and_their_norm_told(config: Config, tmp_path: Path) -> None:
    norms = {}
    for clip in (0.0, 0.01):
        this = opened(with_train(config, clip=clip), tmp_path / str(clip))
        with this.metrics:
            _, told = this._accumulate()
        norm = torch.cat([p.grad.flatten() for p in this.model.parameters() if p.grad is not None]).norm()
        norms[clip] = (told, norm.item())
    assert norms[0.0][0] == pytest.approx(norms[0.0][1], rel=1e-4)
    assert norms[0.01][0] == pytest.approx(norms[0.0][0], rel=1e-4)
    assert norms[0.01][1] == pytest.approx(0.01, rel=1e-3)


def poison(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[Run], bool]) -> None:
    """Make the gradients of the next update NaN when is_bad(run)."""
    original = Run._accumulate

    def accumulate(self: Run) -> tuple[float, float]:
        loss, norm = original(self)
        if is_bad(self):
            for p in self.model.parameters():
                p.grad = torch.full_like(p, float("nan"))
            return float("nan"), float("nan")
        return loss, norm

    monkeypatch.setattr(Run, "_accumulate", accumulate)


def test_an_update_that_is_not_finite_is_left_out(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda run: run.state.step == 2)
    run(with_train(config, steps=3, save_every=1, keep=9), tmp_path / "run")
    before, after, last = (load(path).model for path in list_complete(tmp_path / "run" / "checkpoints"))
    assert not torch.equal(before["wte.weight"], after["wte.weight"])
    assert all(torch.equal(after[name], last[name]) for name in after)
    rows = list(load_rows(tmp_path / "run" / "metrics.jsonl"))
    assert [row["step"] for row in rows if row["kind"] == "event"] == [3]
    assert [row["loss"] is None for row in rows if row["kind"] == "step"] == [False, False, True]


def test_a_run_that_diverged_goes_back_and_ends_with_an_error(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda run: run.state.step >= 5)
    with pytest.raises(WorkloadError, match=r"step 16: a loss .* left out after going back 3 times"):
        run(with_train(config, steps=99, eval_every=50, save_every=4), tmp_path / "run")
    with pytest.raises(WorkloadError, match="left out before the first checkpoint"):
        run(with_train(config, steps=99, eval_every=50, save_every=50), tmp_path / "other")


class Killed(BaseException):
    """As if the process had ended: nothing catches it, nothing is saved after it."""


def die_once(monkeypatch: pytest.MonkeyPatch, when: Callable[[Run], bool]) -> None:
    original = Run.update
    armed = True

    def update(self: Run) -> None:
        nonlocal armed
        if armed and when(self):
            armed = False
            raise Killed
        original(self)

    monkeypatch.setattr(Run, "update", update)


@pytest.mark.parametrize("dies", [None, 6, 14, 17])
def test_bad_data_is_left_behind_and_an_interruption_changes_nothing_of_it(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: int | None
) -> None:
    config = with_train(config, steps=20, keep=3)
    poison(monkeypatch, lambda run: 6 <= run.state.sequences // 4 < 14)  # eight updates, from the seventh on
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    state = run(config, whole)
    rows = list(load_rows(whole / "metrics.jsonl"))
    events = [(row["step"], row["text"]) for row in rows if row["kind"] == "event"]
    assert events == [
        (
            4,
            "8 updates up to step 14 left out, the last for a loss that is not finite: back to step 4, "
            "on with the data after sequence 56",
        )
    ]
    assert (state.step, state.sequences) == (20, 4 * (14 + 16))
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 21))
    assert [row["tokens"] for row in rows if row["kind"] == "step"][3:5] == [4 * 64, 15 * 64]
    if dies is not None:
        die_once(monkeypatch, lambda run: run.state.sequences // 4 == dies)
        with pytest.raises(Killed):
            run(config, killed)
        run(config, killed)
        assert outcome(killed) == outcome(whole)


def test_a_second_way_back_goes_further(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_train(config, steps=20, keep=9)
    poison(monkeypatch, lambda run: 9 <= run.state.sequences // 4 < 25)  # two times eight
    out = tmp_path / "run"
    state = run(config, out)
    events = [row["text"] for row in load_rows(out / "metrics.jsonl") if row["kind"] == "event"]
    assert events == [
        "8 updates up to step 16 left out, the last for a loss that is not finite: back to step 4, "
        "on with the data after sequence 100"
    ]
    assert (state.step, state.sequences) == (20, 100 + 4 * 16)
    assert (out / "checkpoints" / "latest").read_text() == "step-00000020\n"
    assert [int(path.name[-2:]) for path in list_complete(out / "checkpoints")] == [4, 8, 12, 16, 20]


def out_of_memory(monkeypatch: pytest.MonkeyPatch, too_large: Callable[[Run, int], bool]) -> None:
    """Mock of a GPU's memory: a forward pass of too many sequences raises what CUDA's allocator does."""
    original = Run._backward

    def backward(self: Run, part: torch.Tensor, parts: int, **options: bool) -> torch.Tensor:
        if too_large(self, len(part)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, part, parts, **options)

    monkeypatch.setattr(Run, "_backward", backward)


def test_a_step_that_runs_out_of_memory_is_done_again_with_half(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is a mock. Dropout shows that the step is done again from its beginning, not from its middle."""
    config = with_train(config, steps=4, save_every=1, keep=9, batch=8, micro_batch=8)
    run(with_train(config, micro_batch=2), tmp_path / "small")
    first_part = True

    def too_large(run: Run, size: int) -> bool:
        nonlocal first_part
        first_part = not first_part
        # with 4 at a time the second part fails: the first has left gradients and draws by then
        return size == 8 or (size == 4 and first_part)

    out_of_memory(monkeypatch, too_large)
    run(config, tmp_path / "run")
    rows = list(load_rows(tmp_path / "run" / "metrics.jsonl"))
    assert [(row["step"], row["text"]) for row in rows if row["kind"] == "event"] == [
        (0, "out of memory with micro-batch 8: going on with 4"),
        (0, "out of memory with micro-batch 4: going on with 2"),
    ]
    mine, expected = outcome(tmp_path / "run"), outcome(tmp_path / "small")
    assert [row for row in mine["rows"] if row["kind"] == "step"] == [
        row for row in expected["rows"] if row["kind"] == "step"
    ]
    model = "step-00000004/model.safetensors"
    assert mine["files"][model] == expected["files"][model]


def test_memory_that_holds_not_even_one_sequence_is_an_error_that_loses_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is a mock."""
    out_of_memory(monkeypatch, lambda run, size: run.state.step >= 5)
    with pytest.raises(WorkloadError, match="one sequence of 16 tokens does not fit the memory of cpu"):
        run(config, tmp_path / "run")
    assert load(list_complete(tmp_path / "run" / "checkpoints")[-1]).state.step == 4


def test_evaluation_that_runs_out_of_memory_takes_fewer_at_once(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is a mock."""
    tried: list[int] = []
    original = module.evaluate

    def score(model: GPT2, *arguments: Any, micro_batch: int, **options: Any) -> Any:
        tried.append(micro_batch)
        if micro_batch > 1:
            model.eval()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, *arguments, micro_batch=micro_batch, **options)

    run(config, tmp_path / "plain")
    monkeypatch.setattr(module, "evaluate", score)
    run(config, tmp_path / "run")
    assert tried == [2, 1] * 4
    steps = [
        [row for row in outcome(tmp_path / name)["rows"] if row["kind"] == "step"]
        for name in ("plain", "run")
    ]
    assert steps[0] == steps[1]  # dropout is on again afterwards


def test_trying_sizes_changes_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes are really run; the memory that ends at 6 sequences is a mock."""
    out_of_memory(monkeypatch, lambda run, size: size > 6)
    config = with_train(config, batch=12, micro_batch=12, save_every=2)
    run(with_train(config, steps=2, micro_batch=1), tmp_path / "run")
    this = opened(with_train(config, steps=2, micro_batch=1), tmp_path / "run")

    def everything() -> list[torch.Tensor]:
        moments = module.gather_state(this.optimizer, this.model)
        return [t.clone() for t in (*this.model.parameters(), *moments.values(), torch.get_rng_state())]

    before, state = everything(), this.state
    with this.metrics:
        trials = this.probe(module.microbatch.sizes(12))
    assert [(trial.size, trial.tokens_per_s > 0) for trial in trials] == [
        (1, True),
        (2, True),
        (3, True),
        (6, True),
        (12, False),
    ]
    assert all(map(torch.equal, before, everything()))
    assert this.state == state
    assert this.model.training
    assert all(p.grad is None for p in this.model.parameters())


def test_a_micro_batch_of_0_is_chosen_and_kept_with_the_checkpoint(config: Config, tmp_path: Path) -> None:
    config = with_train(config, batch=6, micro_batch=0, steps=4)
    run(config, tmp_path / "run")
    assert load(list_complete(tmp_path / "run" / "checkpoints")[-1]).optimizer["micro_batch/cpu"] == 6
    run(with_train(config, micro_batch=6), tmp_path / "same")
    assert outcome(tmp_path / "run")["files"] == outcome(tmp_path / "same")["files"]
    this = opened(with_train(config, steps=8), tmp_path / "run")
    with this.metrics:
        assert this.micro_batch == 6  # before it would be chosen


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"optimizer": "muon", "muon_lr": 0.02}),
        (torch.float32, {"schedule": "wsd", "decay": 0.5}),
        (torch.float16, {}),
        (torch.bfloat16, {"micro_batch": 0}),
    ],
    ids=["muon", "wsd", "fp16", "bf16 micro-batch 0"],
)
def test_resume_is_exact_with_every_option(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    settings: dict[str, Any],
) -> None:
    config = with_train(config, **settings)

    def go(name: str) -> State:
        return train(config, tmp_path / name, device=CPU, dtype=dtype, reporter=reporter())

    go("whole")
    die_once(monkeypatch, lambda run: run.state.step == 7)
    with pytest.raises(Killed):
        go("killed")
    assert go("killed").step == 12
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_checkpoint_from_before_there_was_a_guard_is_gone_on_from(config: Config, tmp_path: Path) -> None:
    run(with_train(config, steps=4), tmp_path / "run")
    saved = load(list_complete(tmp_path / "run" / "checkpoints")[-1])
    old = {name: t for name, t in saved.optimizer.items() if not name.startswith(module.EXTRAS)}
    assert {name.partition("/")[0] for name in old} == {"exp_avg", "exp_avg_sq", "step"}
    assert {name.partition("/")[0] for name in saved.optimizer.keys() - old.keys()} == {
        "guard",
        "micro_batch",
    }
    this = opened(with_train(config, micro_batch=0), tmp_path / "run")
    with this.metrics:
        assert (len(this.guard.losses), this.micro_batch) == (4, 2)
        this.guard, this.micro_batch = module.Guard(), 0
        this.restore(dataclasses.replace(saved, optimizer=old))
        assert (this.guard, this.micro_batch) == (module.Guard(), 0)
        this.micro_batch = this._choose_micro_batch()
        this.update()
    this.close()


def test_fp16_finds_its_scale_and_keeps_it(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = with_train(config, steps=60, lr=2e-2)
    this = open_run(
        config,
        out,
        device=CPU,
        dtype=torch.float16,
        threads=1,
        clock=lambda: 0.0,
        reporter=reporter(),
    )
    this.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # far too large, so that it overflows first
    with this.metrics:
        before = this.model.wte.weight.clone()
        this.update()
        assert torch.equal(before, this.model.wte.weight)
        assert this.scaler.get_scale() == 2.0**39
        assert this.guard.skips == 0
        for _ in range(59):
            this.update()
        this.save()
        this.writer.wait()
    assert 2.0 < math.log2(this.scaler.get_scale()) < 30
    rows = list(load_rows(out / "metrics.jsonl"))
    assert [row["kind"] for row in rows] == ["step"] * 60  # no event: that is how the scale is found
    assert rows[0]["grad_norm"] is None
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    again = open_run(
        config,
        out,
        device=CPU,
        dtype=torch.float16,
        threads=1,
        clock=lambda: 0.0,
        reporter=reporter(),
    )
    with again.metrics:
        assert again.scaler.state_dict() == this.scaler.state_dict()
        assert again.guard == this.guard


def test_a_lost_gpu_is_a_readable_error_that_loses_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is a mock: what torch raises when a card falls off the bus."""

    def fall_off(run: Run) -> bool:
        if run.state.step == 6:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might …")
        return False

    poison(monkeypatch, fall_off)
    with pytest.raises(WorkloadError) as caught:
        run(config, tmp_path / "run")
    assert caught.value.message == (
        "step 6: cpu was lost: CUDA error: unspecified launch failure; step-00000004 is safe"
    )
    assert f"train --resume --out {tmp_path / 'run'}" in caught.value.hint


def test_tokens_that_the_model_does_not_have_are_refused(config: Config, tmp_path: Path) -> None:
    this = opened(config, tmp_path / "run")
    with this.metrics:
        this.feed.windows.shards[0] = this.feed.windows.shards[0].copy()
        this.feed.windows.shards[0][:] = 300
        with pytest.raises(
            WorkloadError, match=r"a token 300 in the step from sequence 0 on, but .* 0 … 256"
        ):
            this.update()


def test_a_disk_too_small_is_refused_before_the_first_step(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 300_000))
    with pytest.raises(WorkloadError, match=r"4 checkpoints of \d+ kB each need \d+ kB, but 300 kB are free"):
        run(config, tmp_path / "run")
    assert list(load_rows(tmp_path / "run" / "metrics.jsonl")) == []


def test_the_pace_is_told_once_it_is_known(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    original = Run._accumulate

    def accumulate(self: Run) -> tuple[float, float]:
        nonlocal now
        now += 0.5 if self.state.step >= 5 else 3.0  # the first are slow
        return original(self)

    monkeypatch.setattr(Run, "_accumulate", accumulate)
    stream = io.StringIO()
    config = with_train(config, steps=62, eval_every=40, sample_tokens=0)
    train(
        config,
        tmp_path / "run",
        device=CPU,
        dtype=torch.float32,
        reporter=Reporter(stream, lambda: 0.0, 1),
        clock=lambda: now,
    )
    lines = [line for line in stream.getvalue().splitlines() if line.startswith(("pace", "disk"))]
    assert lines[0] == "pace     128 tokens/s: 42 steps more take 0:21"  # 64 tokens in half a second
    assert lines[1].startswith("disk     up to 4 checkpoints of ")
    assert len(lines) == 2


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_plan_is_shortened_to_fit_the_time(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    now = 0.0
    original = Run._accumulate

    def accumulate(self: Run) -> tuple[float, float]:
        nonlocal now
        now += 1.0
        return original(self)

    monkeypatch.setattr(Run, "_accumulate", accumulate)
    config = with_train(
        config, steps=100, max_seconds=50.0, eval_every=40, sample_tokens=0, schedule=schedule
    )
    out = tmp_path / "run"
    stopped = run(config, out, clock=lambda: now, should_stop=lambda: now == 30)
    assert (stopped.step, stopped.steps) == (30, 50)
    finished = run(config, out, clock=lambda: now)
    assert finished.step == finished.steps == 50
    rows = list(load_rows(out / "metrics.jsonl"))
    assert [row["text"] for row in rows if row["kind"] == "event"] == [
        "planning 50 steps instead of 100, to end within 50 s"
    ]
    assert [row["lr"] for row in rows if row["kind"] == "step"][-1] == pytest.approx(config.train.lr * 0.1)
    assert (
        run(with_train(config, steps=53, max_seconds=0.0), out).step == 53
    )  # other steps are asked for: granted


def test_a_checkpoint_is_there_before_it_is_evaluated(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fail(*_: object, **__: object) -> None:
        calls.append(1)
        if len(calls) > 1:  # the first is before any step
            raise MemoryError

    monkeypatch.setattr(module, "evaluate", fail)
    with pytest.raises(MemoryError):
        run(config, tmp_path / "run")
    assert load(list_complete(tmp_path / "run" / "checkpoints")[-1]).state.step == 4


def test_best_is_the_lowest_validation_loss(config: Config, tmp_path: Path) -> None:
    # a rate so high that it gets worse
    out = tmp_path / "run"
    run(with_train(config, steps=40, eval_every=5, save_every=5, lr=1.0, warmup=10, keep=1), out)
    scores = {
        row["step"]: row["val_loss"] for row in load_rows(out / "metrics.jsonl") if row["kind"] == "eval"
    }
    del scores[0]
    best = min(scores, key=lambda step: scores[step])
    assert (out / "checkpoints" / "best").read_text() == f"step-{best:08d}\n"
    assert f"step-{best:08d}" in [path.name for path in list_complete(out / "checkpoints")]


def test_gpt2s_byte_pairs_are_trained(tmp_path: Path) -> None:
    settings = (
        "n_layer=1 n_head=2 n_embd=32 n_ctx=32 steps=25 batch=4 micro_batch=4 lr=2e-2 warmup=3 eval_every=25"
    )
    config = load_config("gpt2-124m", [*settings.split(), "eval_sequences=8", "sample_tokens=12", "seed=3"])
    run(config, tmp_path / "run")
    rows = list(load_rows(tmp_path / "run" / "metrics.jsonl"))
    first, last = (row for row in rows if row["kind"] == "eval")
    assert first["val_loss"] == pytest.approx(10.82, abs=0.1)  # ln 50257
    assert last["val_loss"] < 8.0
    # a token is about three bytes of this text
    assert first["val_loss"] / 0.693147 / first["val_bits_per_byte"] == pytest.approx(3.1, abs=0.4)


def test_bf16_trains_too(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(with_train(config, steps=30), out, device=CPU, dtype=torch.bfloat16, reporter=reporter())
    losses = [row["val_loss"] for row in load_rows(out / "metrics.jsonl") if row["kind"] == "eval"]
    assert losses[-1] < 4.0
    weights = load(list_complete(out / "checkpoints")[-1]).model
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
