"""`fab` run until it has said something, then killed: what a test does not look at need not be waited for."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from provision.pins import fingerprint_of, parse_key
from provision.rehearsal.loop import Rehearsal, fab_command
from provision.rehearsal.vm import wait_until

DEADLINE_S = 3600


@contextmanager
def fab_running(rehearsal: Rehearsal, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A task of the fabfile with its output in a file; killed at the end, if it still runs."""
    output = rehearsal.logs / f"{words[0]}-{time.monotonic_ns()}.log"
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        fab = subprocess.Popen(
            fab_command(*words),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, **rehearsal.environment, "PYTHONUNBUFFERED": "1"},
        )
    try:
        yield fab, output
    finally:
        fab.kill()
        fab.wait()


def provision_until(rehearsal: Rehearsal, pattern: str, *words: str, fingerprint: bool = True) -> str:
    """`provision` until its output has that (a regular expression); all that it said so far."""
    if fingerprint:
        words = (*words, f"--fingerprint={fingerprint_of(parse_key(rehearsal.bed.parts.keys.host_line))}")
    with fab_running(rehearsal, "provision", *words) as (fab, output):

        def said() -> bool:
            return re.search(pattern, " ".join(output.read_text().split())) is not None

        def check() -> None:
            rehearsal.vm.check()
            assert fab.poll() is None or said(), (
                f"fab ended before it said {pattern!r}:\n{output.read_text()}"
            )

        wait_until(said, check, DEADLINE_S, f"fab to say {pattern!r}")
        return output.read_text()
