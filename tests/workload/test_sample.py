"""python -m workload sample."""

import io
from pathlib import Path

import pytest
import torch

from tests.workload.conftest import TINY
from workload import checkpoint
from workload.__main__ import main
from workload.checkpoint import State
from workload.config import Config, DataConfig
from workload.model import GPT2


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a model with opinions."""
    torch.manual_seed(0)
    model = GPT2(TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    state = State(step=3, steps=3, sequences=9, best_val_loss=None, elapsed_s=1.0, metrics_bytes=0)
    config = Config(model=TINY, data=DataConfig(tokenizer="bytes"))
    return checkpoint.save(tmp_path, config, state, model=model.state_dict(), optimizer={}, random={})


def sample(capsys: pytest.CaptureFixture[str], saved: Path, *options: str) -> str:
    command = ["sample", str(saved), "--device", "cpu", "--threads", "1", "--tokens", "20", *options]
    assert main(command) == 0
    return capsys.readouterr().out


def test_several_samples_are_those_of_their_seeds(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = sample(capsys, saved, "--prompt", "ab", "--count", "2", "--seed", "7", "--top-p", "0.9")
    one, other = (sample(capsys, saved, "--prompt", "ab", "--seed", seed, "--top-p", "0.9") for seed in "78")
    assert one != other
    assert several == f"--- 1 of 2, seed 7\n{one}--- 2 of 2, seed 8\n{other}"
    assert sample(capsys, saved, "--prompt", "ab", "--seed", "7", "--top-p", "0.001") == sample(
        capsys, saved, "--prompt", "ab", "--temperature", "0"
    )


def test_a_prompt_comes_from_stdin_and_a_long_one_is_cut_aloud(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ab"))
    assert sample(capsys, saved, "--prompt", "-") == sample(capsys, saved, "--prompt", "ab")
    long = "x" * 30 + "0123456789abcdef"
    assert main(["sample", str(saved), "--prompt", long, "--tokens", "1", "--temperature", "0"]) == 0
    shown = capsys.readouterr()
    assert "the prompt has 46 tokens, the context 16: only its end is read" in shown.err
    end = sample(capsys, saved, "--prompt", long[-16:], "--tokens", "1", "--temperature", "0")
    assert shown.out == long[:-16] + end


def test_options_out_of_range_are_named_together(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--tokens",
        "0",
        "--count",
        "0",
        "--temperature",
        "-1",
        "--top-k",
        "-1",
        "--top-p",
        "0",
        "--seed",
        "-1",
    ]
    assert main(["sample", str(saved), *options]) == 1
    error = capsys.readouterr().err
    for complaint in (
        "--tokens must be 1 or more, not 0",
        "--count must be 1 or more, not 0",
        "--temperature must be 0 or more, not -1.0",
        "--top-k must be 0 or more, not -1",
        "--top-p must be more than 0 and at most 1, not 0.0",
        "--seed must be 0 or more, not -1",
    ):
        assert complaint in error
