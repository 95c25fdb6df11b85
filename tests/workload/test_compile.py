"""The compiled training step: the same numbers, or the uncompiled step and a reason."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.workload.conftest import TINY
from workload.compile import compile_loss
from workload.model import GPT2

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # what torch does inside itself


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def make(n_layer: int = 2) -> tuple[GPT2, Tensor, Tensor]:
    torch.manual_seed(0)
    model = GPT2(dataclasses.replace(TINY, n_layer=n_layer)).train()
    ids = torch.randint(0, TINY.vocab_size, (3, 17))
    return model, ids[:, :-1], ids[:, 1:]


def nothing(text: str) -> None:
    raise AssertionError(text)


def test_only_a_gpu_compiles_by_itself() -> None:
    model, *_ = make()
    for mode, device in (("auto", CPU), ("off", CPU), ("off", torch.device("cuda"))):
        assert compile_loss(model.loss, mode, device, nothing) == model.loss
    assert compile_loss(model.loss, "auto", torch.device("cuda"), nothing) != model.loss
    with pytest.raises(ValueError, match="not maybe"):
        compile_loss(model.loss, "maybe", CPU, nothing)


def test_a_backend_that_fails_leaves_the_uncompiled_step_and_its_reason() -> None:
    model, ids, targets = make()
    notes: list[str] = []
    calls = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal calls
        calls += 1
        raise FileNotFoundError("no C++ compiler here\nand pages more")

    loss = compile_loss(model.loss, "on", CPU, notes.append, backend)
    first = loss(ids, targets)
    first.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(first, model.loss(ids, targets))
    assert torch.equal(loss(ids, targets), first)
    assert calls == len(notes) == 1
    assert "uncompiled: FileNotFoundError: no C++ compiler here" in notes[0]
    assert "pages" not in notes[0]


def test_too_little_memory_is_not_a_failure_to_compile() -> None:
    """The error is a stand-in: memory of a CPU does not end like that."""

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    run = compile_loss(loss, "on", CPU, nothing, "eager")
    with pytest.raises(torch.OutOfMemoryError):
        run(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_computes_what_the_uncompiled_step_does(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    from torch._inductor import config as inductor  # here, where its warnings are ignored

    model, ids, targets = make(n_layer=1)
    names = set(model.state_dict())
    expected = model.loss(ids, targets)
    wanted = torch.autograd.grad(expected * 2, list(model.parameters()))
    loss = compile_loss(model.loss, "on", CPU, nothing, backend)
    with inductor.patch(compile_threads=1):
        seen = loss(ids, targets)
    torch.testing.assert_close(seen, expected)
    for mine, theirs in zip(torch.autograd.grad(seen * 2, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert set(model.state_dict()) == names


def test_the_whole_step_is_one_graph_and_a_second_size_one_more() -> None:
    """A break in the graph, or a new one each step, would cost what compiling gains."""
    model, ids, targets = make()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    loss = compile_loss(model.loss, "on", CPU, nothing, backend)
    for _ in range(3):
        loss(ids, targets)
    assert graphs == 1
    for _ in range(2):
        loss(ids[:2], targets[:2])
    assert graphs == 2
    model.eval()
    with torch.no_grad():
        model(ids)
    model.train()
    loss(ids, targets)
    assert graphs == 2
