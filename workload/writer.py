"""Checkpoints written behind the back of a run, so that the next step need not wait for the disk.

`Writer.save` copies the tensors, which takes as long as memory does, and returns; one thread writes, hashes and syncs
the copy, then prunes. Everything that changes the folder of checkpoints goes through that thread in the order in which
it was asked for: no two writes at once, and no pruning of what is being written.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from workload import checkpoint
from workload.checkpoint import State
from workload.config import Config
from workload.errors import WorkloadError

LONG_S = 1.0  # a wait for the disk that is worth a line


class Writer:
    """The one writer of a run's checkpoints. Use as a context manager: its end waits for what is being written."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int,
        note: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Below `folder`, pruned as `checkpoint.prune` says; `note` gets a line when a step has to wait."""
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._note, self._clock = note, clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._asked: list[Future[None]] = []
        self._copies: dict[
            str, Tensor
        ] = {}  # kept from one save to the next: memory that is pinned or cleared once

    def save(
        self,
        config: Config,
        state: State,
        *,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        random: Mapping[str, Tensor],
        beside: Sequence[Path] = (),
    ) -> None:
        """Begin to write what `checkpoint.save` writes, as it is now. Waits for the one before; raises its error."""
        started_s = self._clock()
        self.wait()
        waited_s = self._clock() - started_s
        if waited_s > LONG_S:
            self._note(
                f"step {state.step}: waited {waited_s:.1f} s until the checkpoint before was written; "
                "a larger train.save_every would not"
            )
        groups = {"model": model, "optimizer": optimizer, "random": random}
        copies = {
            name: {key: self._copy(f"{name}/{key}", tensor) for key, tensor in tensors.items()}
            for name, tensors in groups.items()
        }
        events = _record({t.device for tensors in groups.values() for t in tensors.values()})

        def write() -> None:
            for event in events:
                event.synchronize()
            checkpoint.save(self._folder, config, state, beside=beside, **copies)
            self._prune()

        self._asked.append(self._thread.submit(write))

    def point_best(self, step: int) -> None:
        """Make ``best`` name the checkpoint of `step`, as soon as that is complete."""

        def point() -> None:
            name = checkpoint.folder_name(step)
            if not (self._folder / name / checkpoint.MANIFEST).exists():
                return  # its write failed, and says so
            try:
                checkpoint.point(self._folder, "best", name)
            except OSError as error:
                raise WorkloadError(
                    f"{self._folder / 'best'} could not be written: {error}",
                    f"make room, then: python -m workload train --resume --out {self._folder.parent}",
                ) from error
            self._prune()

        self._asked.append(self._thread.submit(point))

    def check(self) -> None:
        """Raise the WorkloadError of a write that failed; costs nothing."""
        while self._asked and self._asked[0].done():
            self._asked.pop(0).result()

    def wait(self) -> None:
        """Until all that was asked for is on the disk. Raises the first error."""
        while self._asked:
            self._asked.pop(0).result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        try:
            self.wait()
        except WorkloadError as failed:
            if error is None:
                raise
            self._note(str(failed))  # what ended the run is the error that is told; this is said too

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` in memory of the host that nobody else writes to; from a GPU complete only at a later event."""
        copy = self._copies.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = self._copies[name] = _allocate(tensor)
        # On the stream of the training: the next update comes after it, whatever the host does meanwhile.
        return copy.copy_(tensor.detach(), non_blocking=True)

    def _prune(self) -> None:
        try:
            checkpoint.prune(self._folder, keep=self._keep, keep_every=self._keep_every)
        except OSError as error:
            raise WorkloadError(
                f"{self._folder} could not be pruned: {error}", "look at that disk"
            ) from error


def _allocate(like: Tensor) -> Tensor:
    """Host memory for a copy; pinned for a GPU, which then copies by itself, where the system lets so much be pinned."""
    try:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
    except RuntimeError:
        return torch.empty(like.shape, dtype=like.dtype)


def _record(devices: set[torch.device]) -> list[torch.cuda.Event]:
    """An event behind the copies on each GPU."""
    events = []
    for device in devices:
        if device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            events.append(event)
    return events
