"""Files that are whole or as they were, and that survive a power cut. Needs nothing heavy."""

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path

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
