"""How fast the disk below a folder writes, reads, and finds small pieces: `disk.py FOLDER SECONDS READ WRITE`.

READ and WRITE are the least MB/s that it should do.
"""

import mmap
import os
import random
import sys
import tempfile
import time
from pathlib import Path

MIB = 2**20
MOST_BYTES = 2**30
PIECE = 4096


def main(folder: Path, seconds: float, least_read: float, least_write: float) -> int:
    """`seconds`: for each of the three at most, so that a slow disk does not take all day."""
    free = os.statvfs(folder)
    room = min(MOST_BYTES, free.f_bavail * free.f_frsize // 4) // MIB
    assert room >= 8, (
        f"{folder} has no room to try it: {free.f_bavail * free.f_frsize / MIB:.0f} MiB are free"
    )
    handle, name = tempfile.mkstemp(prefix=".verify-", dir=folder)
    os.close(handle)
    try:
        written, read, pieces = measure(name, room, seconds)
    finally:
        os.unlink(name)
    print(f"figure disk_write_mb_per_s {written:.1f}")
    print(f"figure disk_read_mb_per_s {read:.1f}")
    print(f"figure disk_reads_per_s {pieces:.0f}")
    print(f"reads {read:,.0f} MB/s, writes {written:,.0f} MB/s, {pieces:,.0f} pieces of 4 KiB a second")
    if read >= least_read and written >= least_write:
        return 0
    print(f"at least {least_read:,.0f} and {least_write:,.0f} MB/s were expected")
    return 1


def measure(name: str, mebibytes: int, seconds: float) -> tuple[float, float, float]:
    """(MB/s written, MB/s read, 4 KiB reads a second), past the page cache."""
    block = mmap.mmap(-1, MIB)  # begins at a page, as direct reads and writes must
    block.write(random.Random(0).randbytes(MIB))  # not zeros, which some disks do not store
    handle = open_direct(name, os.O_WRONLY)
    began = time.perf_counter()
    count = 0
    while count < mebibytes and time.perf_counter() - began < seconds:
        count += os.pwrite(handle, block, count * MIB) // MIB
    os.fsync(handle)
    written = count * MIB / (time.perf_counter() - began) / 1e6
    os.close(handle)
    handle = open_direct(name, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # where it is not direct after all
    began = time.perf_counter()
    place = 0
    while place < count and time.perf_counter() - began < seconds:
        place += os.preadv(handle, [block], place * MIB) // MIB
    read = place * MIB / (time.perf_counter() - began) / 1e6
    piece, choose = memoryview(block)[:PIECE], random.Random(1)
    began = time.perf_counter()
    pieces = 0
    while time.perf_counter() - began < min(2.0, seconds):
        pieces += os.preadv(handle, [piece], choose.randrange(count * MIB // PIECE) * PIECE) // PIECE
    rate = pieces / (time.perf_counter() - began)
    os.close(handle)
    return written, read, rate


def open_direct(name: str, how: int) -> int:
    """Past the page cache where the file system can: some in memory cannot."""
    try:
        return os.open(name, how | os.O_DIRECT)
    except OSError:
        return os.open(name, how)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(float, sys.argv[2:])))
