"""How many sequences at once: which sizes are tried, and which is taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workload.microbatch import Trial, bounded, choose, probe, sizes, smaller, time_steps


def test_sizes_are_divisors_that_grow() -> None:
    assert sizes(512) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert sizes(12) == [1, 2, 3, 6, 12]
    assert sizes(480) == [1, 2, 3, 5, 8, 12, 20, 30, 48, 80, 120, 240, 480]
    assert sizes(7) == [1, 7]
    assert sizes(1) == [1]


@settings(deadline=None)  # other work on the machine is not an error
@given(st.integers(1, 600), st.integers(1, 2048))
def test_what_is_taken_divides_the_batch(batch: int, n_ctx: int) -> None:
    for size in sizes(batch):
        assert batch % size == 0
        half = smaller(batch, size)
        assert (half is None) == (size == 1)
        assert half is None or (batch % half == 0 and half <= size / 2)
    size = bounded(batch, n_ctx)
    assert batch % size == 0
    assert size == 1 or size * n_ctx <= 4096


def test_a_cpu_takes_what_is_modest() -> None:
    assert bounded(12, 64) == 12  # the demo
    assert bounded(512, 1024) == 4
    assert bounded(512, 8192) == 1


def rates(table: dict[int, float]) -> tuple[list[Trial], list[int]]:
    """`probe` over sizes that do this many tokens a second; 0: out of memory."""
    tried = []

    def try_size(size: int) -> float:
        tried.append(size)
        if table[size] == 0:
            raise torch.OutOfMemoryError("mock")
        return table[size]

    return probe(list(table), try_size), tried


@pytest.mark.parametrize(
    ("table", "tried", "chosen"),
    [
        ({1: 10, 2: 18, 4: 30, 8: 50, 16: 0, 32: 9}, [1, 2, 4, 8, 16], 8),  # nothing after what does not fit
        (
            {1: 10, 2: 18, 4: 30, 8: 30.1, 16: 30.2, 32: 0},
            [1, 2, 4, 8, 16, 32],
            4,
        ),  # 1% is not worth the memory
        ({1: 10, 2: 30, 4: 29, 8: 28, 16: 99}, [1, 2, 4, 8], 2),  # slower twice: the cache is too small
        ({1: 10, 2: 30, 4: 29, 8: 31, 16: 60}, [1, 2, 4, 8, 16], 16),
        ({1: 0, 2: 9}, [1], None),
    ],
)
def test_the_fastest_that_fits(table: dict[int, float], tried: list[int], chosen: int | None) -> None:
    """The memory that ends is a mock."""
    trials, seen = rates(table)
    assert seen == tried
    assert choose(trials) == chosen


def test_other_errors_are_not_taken_for_memory() -> None:
    def fail(size: int) -> float:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        probe([1, 2], fail)

    def cpu(size: int) -> float:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    assert probe([1, 2], cpu) == [Trial(1, 0.0)]


def test_the_first_step_and_a_hiccup_do_not_count() -> None:
    ticks = iter([0.0, 1.0, 10.0, 19.0, 20.0, 22.0])
    steps = []
    assert time_steps(lambda: steps.append(1), lambda: next(ticks)) == 2.0
    assert len(steps) == 4
