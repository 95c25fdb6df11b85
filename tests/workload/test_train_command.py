"""What `python -m workload train` does with its options, beyond what test_cli.py shows."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from workload import compile as compiling
from workload.__main__ import main
from workload.runs import CONFIG
from workload.train import Run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # what torch does inside itself
TINY = [
    *("tokenizer=bytes", "n_layer=1", "n_head=2", "n_embd=16", "n_ctx=16", "batch=2", "micro_batch=2"),
    *("max_seconds=0", "steps=6", "eval_every=2", "save_every=2", "eval_sequences=2", "sample_tokens=8"),
]


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    for number, handler in before.items():
        signal.signal(number, handler)


def train(out: Path, *options: str) -> int:
    return main(
        ["train", "--out", str(out), "--threads", "1", "--device", "cpu", "--dtype", "fp32", *options]
    )


@pytest.mark.parametrize(("options", "mode"), [([], "auto"), (["--compile", "on"], "on")])
def test_the_step_is_compiled_once_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], mode: str
) -> None:
    """torch's tracer is real; what it makes is run as it is instead of going to a C++ compiler, which takes a minute."""
    graphs: list[int] = []
    modes: list[str] = []
    original = compiling.compile_loss

    def run_as_it_is(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward

    def compile_loss(loss: Any, mode: str, *rest: Any) -> Any:
        modes.append(mode)
        return original(loss, mode, *rest, backend=run_as_it_is)

    torch.compiler.reset()
    monkeypatch.setattr(compiling, "compile_loss", compile_loss)
    counts: list[int] = []
    after_each_update(monkeypatch, lambda: counts.append(len(graphs)))
    assert train(tmp_path / "run", *options, "--set", *TINY) == 0
    assert modes == [mode]
    # as many graphs after the first step as after the last, with evaluations and samples between them
    assert len(counts) == 6
    assert (counts[0] > 0) == (mode == "on")
    assert set(counts) == {counts[0]}


def after_each_update(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    original = Run.update

    def update(self: Run) -> None:
        original(self)
        then()

    monkeypatch.setattr(Run, "update", update)


def test_another_optimizer_is_refused_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(out, "--set", *TINY, "steps=2") == 0
    before = {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "report.html"
    }
    assert train(out, "--set", "optimizer=adamw", "steps=4") == 1
    error = capsys.readouterr().err
    assert f"{out} was begun with train.optimizer = muon, whose state adamw cannot use" in error
    assert all(path.read_bytes() == content for path, content in before.items())
    assert 'optimizer = "muon"' in (out / CONFIG).read_text()
    assert train(out, "--set", "steps=4") == 0
