"""Batches that are cut ahead of time are the batches that are asked for."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workload.data import Batch, Windows
from workload.errors import WorkloadError
from workload.prefetch import Prefetcher

WINDOWS = Windows([np.arange(5000, dtype=np.uint16)], 8, seed=1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 9), st.integers(1, 4)), max_size=5))
def test_a_batch_is_what_the_windows_cut_wherever_one_goes_on(jumps: list[tuple[int, int, int]]) -> None:
    with Prefetcher(WINDOWS.batch, pin=False) as batches:
        for first, count, steps in jumps:
            for step in range(steps):
                batch = batches.batch(first + step * count, count)
                assert batch.dtype == torch.int64
                assert np.array_equal(batch.numpy(), WINDOWS.batch(first + step * count, count))


def test_the_next_batches_are_cut_before_they_are_asked_for_in_another_thread() -> None:
    asked: list[tuple[int, int]] = []
    threads: set[int] = set()
    third = threading.Event()

    def cut(first: int, count: int) -> Batch:
        asked.append((first, count))
        threads.add(threading.get_ident())
        if len(asked) == 3:
            third.set()
        return WINDOWS.batch(first, count)

    with Prefetcher(cut, pin=False, ahead=2) as batches:
        batches.batch(10, 5)
        assert third.wait(timeout=60)
        assert asked == [(10, 5), (15, 5), (20, 5)]
        batches.batch(15, 5)
        batches.batch(20, 5)
    assert asked.count((15, 5)) == asked.count((20, 5)) == 1  # not cut again
    assert threads.isdisjoint({threading.get_ident()})


def test_an_error_reaches_who_asked() -> None:
    def cut(first: int, count: int) -> Batch:
        if first >= 4:
            raise WorkloadError("the disk has gone")
        return WINDOWS.batch(first, count)

    with Prefetcher(cut, pin=False) as batches:
        batches.batch(0, 2)
        batches.batch(2, 2)
        with pytest.raises(WorkloadError, match="the disk has gone"):
            batches.batch(4, 2)


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    with Prefetcher(WINDOWS.batch, pin=False) as batches:
        batches.batch(0, 4)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_on_a_gpu_batches_are_pinned() -> None:
    with Prefetcher(WINDOWS.batch, pin=True) as batches:
        batch = batches.batch(3, 4)
        assert batch.is_pinned()
        assert np.array_equal(batch.to("cuda", non_blocking=True).cpu().numpy(), WINDOWS.batch(3, 4))
