"""Batches cut ahead of time, so that the device never waits for a disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from workload.data import Batch


class Prefetcher:
    """`cut(first, count)` as a tensor, with the batches that will be asked for next already under way in one thread.

    `cut` is a pure function, as `Windows.batch` is; so what comes back never depends on what was fetched ahead, and
    who goes on elsewhere (a resumed run, data that is skipped, another batch size) only waits once. pin: in memory
    that a GPU copies from while it computes; the copy is then ``.to(device, non_blocking=True)``.

        with Prefetcher(windows.batch, pin=device.type == "cuda") as batches:
            ids = batches.batch(state.sequences, config.train.batch)
    """

    def __init__(self, cut: Callable[[int, int], Batch], *, pin: bool, ahead: int = 2) -> None:
        self._cut, self._pin, self._ahead = cut, pin, ahead
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._fetching: dict[tuple[int, int], Future[torch.Tensor]] = {}

    def batch(self, first: int, count: int) -> torch.Tensor:
        """Sequences first … first + count - 1, (count, n_ctx + 1) int64; raises what cutting them raised."""
        wanted = [(first + i * count, count) for i in range(self._ahead + 1)]
        for key in self._fetching.keys() - set(wanted):
            self._fetching.pop(key).cancel()
        for key in wanted:
            if key not in self._fetching:
                self._fetching[key] = self._thread.submit(self._fetch, *key)
        return self._fetching.pop(wanted[0]).result()

    def _fetch(self, first: int, count: int) -> torch.Tensor:
        batch = torch.from_numpy(self._cut(first, count))
        return batch.pin_memory() if self._pin else batch

    def close(self) -> None:
        """End the thread; what was fetched ahead is dropped."""
        self._fetching.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
