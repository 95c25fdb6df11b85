"""Dense layers and the chunked loss, against torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workload import products
from workload.products import Linear, linear_cross_entropy

N, C = 50, 24


def make(n_vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C), weight (V, C) and targets (N), with opinions strong enough for a softmax that is not flat."""
    generator = torch.Generator().manual_seed(n_vocab)
    x = torch.randn(N, C, generator=generator, dtype=dtype)
    weight = torch.randn(n_vocab, C, generator=generator, dtype=dtype)
    targets = torch.randint(0, n_vocab, (N,), generator=generator)
    return x.requires_grad_(), weight.requires_grad_(), targets


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    # not 1: what comes from above, as with a loss scaler or a mean over micro-batches, must be multiplied in
    return torch.autograd.grad(loss * 3.0, inputs)


@pytest.fixture(params=[1 << 26, 5000 * 7, 1])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One piece, several of unequal length, and a piece a row."""
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", {"cpu": request.param})


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("n_vocab", [3, 257, 5000])  # 5000 is padded to 5120
def test_the_loss_and_its_gradients_are_torchs(n_vocab: int) -> None:
    x, weight, targets = make(n_vocab)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = F.cross_entropy(exact_x @ exact_weight.T, targets)
    loss = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(
        gradients(loss, x, weight), gradients(expected, exact_x, exact_weight), strict=True
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        losses = linear_cross_entropy(x, weight, targets, "none")
        torch.testing.assert_close(
            losses, F.cross_entropy(x @ weight.T, targets, reduction="none"), rtol=1e-5, atol=1e-5
        )


def test_gradients_in_double_are_those_of_finite_differences() -> None:
    x, weight, targets = make(7, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, targets), (x, weight))


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_products_are_rounded_and_the_sums_are_not(dtype: torch.dtype) -> None:
    x, weight, targets = make(5000)
    expected = F.cross_entropy(x @ weight.T, targets)
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(gradients(loss, x, weight), gradients(expected, x, weight), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 2e-2 * theirs.norm()


def test_small_gradients_of_many_rows_survive_fp16() -> None:
    """Divided by N before the product, as autograd does it, each would be less than fp16's least number."""
    n_vocab, rows = 4096, 4096
    x = torch.full((rows, C), 0.5).requires_grad_()
    weight = torch.zeros(n_vocab, C, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.float16):
        linear_cross_entropy(x, weight, targets).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    torch.testing.assert_close(
        weight.grad[1:], torch.full((n_vocab - 1, C), 0.5 / n_vocab), rtol=1e-2, atol=0
    )
    torch.testing.assert_close(weight.grad[0], torch.full((C,), -0.5 * (1 - 1 / n_vocab)), rtol=1e-2, atol=0)


def test_a_loss_beyond_the_exponents_of_fp32_is_finite() -> None:
    x, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
    loss = linear_cross_entropy(x, weight, torch.tensor([1]))
    assert loss.item() == pytest.approx(400.0)


def test_no_tensor_is_as_large_as_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    x, weight, targets = make(5000)
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", {"cpu": 5120 * 10})
    with Watch():
        linear_cross_entropy(x, weight, targets).backward()  # type: ignore[no-untyped-call]
    assert largest == 5120 * C  # the padded head; ten rows of logits are fewer
    assert largest < N * 5000


def test_losses_of_each_row_have_no_gradient_and_say_so() -> None:
    x, weight, targets = make(7)
    with pytest.raises(ValueError, match="no_grad"):
        linear_cross_entropy(x, weight, targets, "none")
    with pytest.raises(ValueError, match='not "sum"'):
        linear_cross_entropy(x, weight, targets, "sum")


def test_a_head_that_is_not_trained_costs_no_gradient() -> None:
    x, weight, targets = make(7)
    linear_cross_entropy(x, weight.detach(), targets).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [40, 41])
def test_a_dense_layer_is_the_same_from_either_library(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, bias: bool, columns: int
) -> None:
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: onednn)
    torch.manual_seed(0)
    mine, theirs = Linear(C, columns, bias=bias), torch.nn.Linear(C, columns, bias=bias)
    theirs.load_state_dict(mine.state_dict())
    inputs = [torch.randn(2, 3, C).requires_grad_() for _ in range(2)]
    inputs[1] = inputs[0].detach().clone().requires_grad_()
    outputs = [layer(x) for layer, x in zip((mine, theirs), inputs, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        torch.testing.assert_close(mine(inputs[0]), outputs[1])
        for shape in ((1, 1, C), (C,)):  # one row: generation
            row = torch.randn(shape)
            torch.testing.assert_close(mine(row), theirs(row))
        assert mine.double()(inputs[0].double()).dtype == torch.float64


def test_the_loss_at_chance_is_the_logarithm_of_the_vocabulary() -> None:
    x, _, targets = make(5000)
    assert linear_cross_entropy(x, torch.zeros(5000, C), targets).item() == pytest.approx(math.log(5000))
