"""The run's sequences on the device."""

import torch
from torch import Tensor

from workload.data import Batch, Windows
from workload.errors import WorkloadError
from workload.prefetch import Prefetcher


class Feed:
    """Batches of the `batch` sequences of a step, or of the share of `rank` of them; the next are cut ahead."""

    def __init__(
        self,
        windows: Windows,
        batch: int,
        vocab_size: int,
        device: torch.device,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.windows = windows
        self._batch, self._vocab_size, self._device = batch, vocab_size, device
        self._rank, self._world = rank, world
        self._ahead = Prefetcher(self._cut, pin=device.type == "cuda")

    def take(self, first: int) -> Tensor:
        """Of the run's sequences first … first + batch - 1 this rank's, with the token after each: (·, n_ctx + 1)."""
        return self._ahead.batch(first, self._batch).to(self._device, non_blocking=True)

    def load(self, first: int, count: int) -> Tensor:
        """`count` sequences from `first` on, whatever the rank, for trials."""
        return torch.from_numpy(self._checked(self.windows.batch(first, count), first)).to(self._device)

    def close(self) -> None:
        self._ahead.close()

    def _cut(self, first: int, count: int) -> Batch:
        return self._checked(self.windows.batch(first, count, self._rank, self._world), first)

    def _checked(self, ids: Batch, first: int) -> Batch:
        """Raises WorkloadError for tokens that the model does not have.

        Without that check the embedding would read past its end: on a GPU, that costs the process its device.
        """
        if ids.max() >= self._vocab_size or ids.min() < 0:
            raise WorkloadError(
                f"the data has a token {ids.max() if ids.min() >= 0 else ids.min()} in the step from sequence {first} "
                f"on, but the model's are 0 … {self._vocab_size - 1}",
                "the shards are of another tokenizer: prepare them again, or set data.tokenizer to theirs",
            )
        return ids
