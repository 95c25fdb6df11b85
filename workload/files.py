"""Files that are whole or as they were, and that survive a power cut. Needs nothing heavy."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workload.errors import WorkloadError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, the largest file that is allowed


def sync(path: Path) -> None:
    """Make the file's content, or the folder's names, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write the file at once or not at all, over an older one. `durable`: onto the disk before it takes its name."""
    staging = path.with_name(f".{path.name}.partial")
    try:
        staging.write_text(text, encoding="utf-8")
        if durable:
            sync(staging)
        staging.replace(path)
    except OSError:
        with suppress(OSError):
            staging.unlink()
        raise


def hash_file(path: Path) -> str:
    """sha256 of its content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder against a second command; the lock goes with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkloadError(
                f"{folder}: another command is at work there", "wait for it, or name another --out"
            ) from error
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a process of this computer has it by `only_one`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
