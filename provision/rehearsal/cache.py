"""Stages of the bed: made once for given inputs, complete or absent.

A stage is a folder `NAME-KEY` where KEY is a digest of its inputs. It is built as
`NAME-KEY.partial` and renamed, so a build that was killed is a build that never was.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

KEPT_DAYS = 2  # a stage that nobody asked for in so long is removed when a newer one of its name is made


def digest(inputs: Iterable[str | Path]) -> str:
    """Twelve hex digits over strings as they are and files by name and content."""
    total = hashlib.sha256()
    for item in inputs:
        data = item.name.encode() + b"\0" + item.read_bytes() if isinstance(item, Path) else item.encode()
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()[:12]


@dataclass(frozen=True)
class Cache:
    """A folder of stages. `on_build(name)` is called when one has to be made."""

    folder: Path
    on_build: Callable[[str], None] = lambda name: None

    def stage(self, name: str, inputs: Iterable[str | Path], build: Callable[[Path], None]) -> Path:
        """The folder of the stage for these inputs, made by `build(empty folder)` where it is missing."""
        target = self.folder / f"{name}-{digest(inputs)}"
        if not target.exists():
            with self.locked(name):
                self.make(name, target, build)
        with suppress(PermissionError):  # made by root for an ordinary user: its age counts from its making
            os.utime(target)
        return target

    def make(self, name: str, target: Path, build: Callable[[Path], None]) -> None:
        if target.exists():  # another process made it while this one waited for the lock
            return
        self.on_build(name)
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        build(partial)
        partial.rename(target)
        self.prune(name, target)

    def prune(self, name: str, newest: Path) -> None:
        oldest_s = time.time() - KEPT_DAYS * 86400
        for folder in self.folder.glob(f"{name}-*"):
            if folder != newest and folder.stat().st_mtime < oldest_s:
                shutil.rmtree(folder)

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """One builder of a stage at a time, whichever process it is in; released when the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
