"""python -m workload bench: real steps of a tiny model, and arithmetic with a clock of our own."""

import json
import math

import pytest
import torch

from workload.__main__ import main
from workload.bench import render_result, run_bench
from workload.config import load_config
from workload.model import estimate_flops

CPU = torch.device("cpu")
SIZES = ["n_layer=1", "n_head=2", "n_embd=16", "n_ctx=16", "batch=4", "micro_batch=2"]


class Clock:
    """A second passes with each look."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_rates_are_tokens_by_seconds() -> None:
    config = load_config("demo", SIZES)
    result = run_bench(
        config,
        device=CPU,
        dtype=torch.float32,
        compile_mode="off",
        steps=3,
        sample_tokens=5,
        note=lambda text: None,
        clock=Clock(),
    )
    assert (result.forward.median_s, result.backward.low_s, result.update.high_s) == (1.0, 1.0, 1.0)
    assert result.step.median_s == 3.0
    assert result.tokens_per_s == pytest.approx(2 * 16 / 3)
    assert result.flops_per_s == pytest.approx(2 * 16 / 3 * estimate_flops(config.model))
    assert result.mfu is None
    assert result.sample_prompt_tokens == 8
    assert result.sample_first_s == 1.0
    assert result.sample_tokens_per_s == 4.0
    assert result.graphs_after_warm_up == 0
    assert not result.compiled
    text = render_result(result)
    assert "the peak of this device is not known" in text
    assert "3000.0 ms" in text


def test_a_person_and_a_program_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "bench",
        "--preset",
        "demo",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--steps",
        "2",
        "--tokens",
        "4",
    ]
    assert main([*command, "--json", "--set", *SIZES]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["micro_batch"] == 2
    assert seen["parameters"] > 0
    assert seen["peak_memory_bytes"] > 50e6  # torch alone is more
    for key in ("forward", "backward", "update", "step"):
        assert 0 < seen[key]["low_s"] <= seen[key]["median_s"] <= seen[key]["high_s"] < math.inf
    assert main([*command, "--set", *SIZES]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert main(["bench", "--steps", "0"]) == 1
    assert "at least 1 step" in capsys.readouterr().err
