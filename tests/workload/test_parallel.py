"""Several processes over loopback are one process, but for rounding; they stop together and do not hang."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from workload import parallel
from workload.checkpoint import find, load
from workload.config import Config, TrainConfig
from workload.errors import WorkloadError
from workload.launch import FOLDER, launch
from workload.metrics import TIMING, load_rows
from workload.parallel import ALONE, World, check, own_random, read_world, seed_rank
from workload.progress import Reporter
from workload.runs import save_config
from workload.train import train

DEADLINE_S = 240  # of a whole launch on a machine that has much else to do; a hang is what it finds
OPTIONS = ["--device", "cpu", "--dtype", "fp32", "--threads", "1"]


@pytest.fixture
def endless(config: Config) -> Config:
    """Without dropout, whose draws are of a rank, and with more steps than anyone waits for."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dropout=0.0),
        train=dataclasses.replace(config.train, steps=100_000, batch=8, lr=3e-3, keep=3),
    )


def step_rows(out: Path) -> list[dict[str, Any]]:
    rows = load_rows(out / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if k not in (*TIMING, "kind")} for row in rows if row["kind"] == "step"
    ]


def run_alone(config: Config, out: Path, until: int) -> None:
    def stop() -> bool:
        rows = step_rows(out)
        return bool(rows) and rows[-1]["step"] >= until

    reporter = Reporter(io.StringIO(), lambda: 0.0, 1)
    train(config, out, device=torch.device("cpu"), dtype=torch.float32, reporter=reporter, should_stop=stop)


def run_together(
    command: list[str],
    out: Path,
    ranks: Path,
    interrupt: Callable[["subprocess.Popen[str]"], None],
    after: int,
) -> tuple[int, str]:
    """Start `command`, interrupt it once `after` more steps are done; its exit status and all that it said."""
    begun = len(step_rows(out))
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {FOLDER: str(ranks), "OMP_NUM_THREADS": "1"},
    ) as process:
        end_s = time.monotonic() + DEADLINE_S
        while len(step_rows(out)) < begun + after and process.poll() is None and time.monotonic() < end_s:
            time.sleep(0.02)
        if process.poll() is None:
            interrupt(process)
        try:
            said, _ = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    return process.returncode, said


def pids_below(pid: int) -> list[int]:
    """Children of a process, and theirs; none of one that has ended since it was listed."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [below for child in map(int, text.split()) for below in (child, *pids_below(child))]


def ranks_of(process: "subprocess.Popen[str]") -> dict[int, int]:
    """Rank → pid."""
    found = {}
    for pid in pids_below(process.pid):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):  # a compiler, say, that has done its work
            continue
        rank = next((word for word in environ if word.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank.partition(b"=")[2])] = pid
    return found


def test_two_ranks_are_one_process_whatever_they_share_and_stop_together(
    endless: Config, tmp_path: Path
) -> None:
    """ddp until a SIGTERM to the command, then one process, then fsdp under plain torchrun until a SIGTERM to a rank."""
    out = tmp_path / "together"
    save_config(out, endless)
    workload = ["-m", "workload", "train", "--out", str(out), *OPTIONS]

    status, said = run_together(
        [sys.executable, *workload, "--nproc-per-node", "2"],
        out,
        tmp_path,
        lambda process: process.send_signal(signal.SIGTERM),
        after=5,
    )
    assert status == 0, said
    assert "2 processes, ddp" in said
    assert said.count("saved; go on with") == 1  # rank 0 alone talks
    first = load(find(out, "latest"))
    assert f"stopped at step {first.state.step} of 100000" in said
    assert first.state.step == len(step_rows(out)) >= 5
    assert {"cpu", "cpu/1"} == set(first.random)

    run_alone(endless, out, first.state.step + 4)
    second = load(find(out, "latest"))
    assert second.state.step == first.state.step + 4
    assert set(second.random) == {"cpu"}

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    status, said = run_together(
        [*torchrun, *workload, "--parallel", "fsdp"],
        out,
        tmp_path,
        lambda process: os.kill(ranks_of(process)[1], signal.SIGTERM),
        after=5,
    )
    assert status == 0, said
    assert "2 processes, fsdp" in said
    third = load(find(out, "latest"))
    assert third.state.step == len(step_rows(out)) >= second.state.step + 5
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1"}  # each rank said that it ended well
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "0"

    whole = tmp_path / "whole"
    run_alone(endless, whole, third.state.step)
    expected, seen = step_rows(whole), step_rows(out)
    assert [row["step"] for row in seen] == [row["step"] for row in expected]
    for one, other in zip(seen, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-3), one["step"]
    final = load(find(whole, "latest"))
    assert third.state.sequences == final.state.sequences
    assert list(third.model) == list(final.model)
    torch.testing.assert_close(third.model, final.model, rtol=1e-2, atol=1e-3)
    assert set(third.optimizer) == set(final.optimizer)
    samples = [row for row in load_rows(out / "metrics.jsonl") if row["kind"] == "sample"]
    assert len(samples) == third.state.step // 4 + 1  # those of fsdp too


def test_a_rank_that_is_lost_ends_the_others_readably(endless: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    save_config(out, endless)
    status, said = run_together(
        [sys.executable, "-m", "workload", "train", "--out", str(out), *OPTIONS, "--nproc-per-node=2"],
        out,
        tmp_path,
        lambda process: os.kill(ranks_of(process)[1], signal.SIGKILL),
        after=6,
    )
    assert status == 1, said
    assert "error: rank 0 of 2 lost the others: " in said
    assert "--resume goes on from the last checkpoint" in said
    assert load(find(out, "latest")).state.step >= 4
    step = load(find(out, "latest")).state.step
    run_alone(endless, out, step + 1)
    assert len(step_rows(out)) == step + 1


def test_what_torchrun_says_is_read() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert read_world(environ) == World(rank=3, size=8, local_rank=1, kind="ddp")
    assert read_world(environ, "fsdp").kind == "fsdp"
    assert read_world({"RANK": "0", "WORLD_SIZE": "1"}) == ALONE
    assert read_world({"RANK": "0", "WORLD_SIZE": "1"}, "fsdp").kind == "fsdp"
    assert parallel.local_threads({"LOCAL_WORLD_SIZE": "100000"}) == 1


def test_what_cannot_be_trained_together_is_refused() -> None:
    three = World(rank=0, size=3, kind="ddp")
    check(TrainConfig(batch=6), three, torch.float32)
    with pytest.raises(WorkloadError, match="8 sequences a step cannot be shared by 3 ranks"):
        check(TrainConfig(batch=8), three, torch.float32)
    check(TrainConfig(batch=6, optimizer="muon"), three, torch.float32)
    sharded = dataclasses.replace(three, kind="fsdp")
    with pytest.raises(WorkloadError, match="muon needs whole matrices") as caught:
        check(TrainConfig(batch=6, optimizer="muon"), sharded, torch.float32)
    assert "--parallel ddp" in caught.value.hint
    with pytest.raises(WorkloadError, match="fp16"):
        check(TrainConfig(batch=6), sharded, torch.float16)


def test_each_rank_has_generators_of_its_own() -> None:
    states = {name: torch.tensor([i]) for i, name in enumerate(("cpu", "cuda", "cpu/1", "cuda/1", "cpu/11"))}
    two = [own_random(states, World(rank=rank, size=12, kind="ddp")) for rank in (0, 1, 2, 11)]
    assert two == [
        {"cpu": states["cpu"], "cuda": states["cuda"]},
        {"cpu": states["cpu/1"], "cuda": states["cuda/1"]},
        {},
        {"cpu": states["cpu/11"]},
    ]
    draws = []
    for rank, step in ((0, 5), (1, 5), (2, 5), (1, 6)):
        torch.manual_seed(1)
        seed_rank(1, step, World(rank=rank, size=3, kind="ddp"))
        draws.append(torch.rand(2).tolist())
    assert len({tuple(draw) for draw in draws}) == 4
    torch.manual_seed(1)
    assert torch.rand(2).tolist() == draws[0]  # rank 0 draws what a process alone does


@pytest.mark.parametrize("processes", ["0", "-1", "two", "1.5", ""])
def test_a_number_of_processes_that_is_none_is_refused(processes: str) -> None:
    with pytest.raises(WorkloadError, match="--nproc-per-node"):
        launch(["train"], processes)
