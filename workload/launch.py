"""``--nproc-per-node``: torchrun started by the command itself, and its processes stopped so that they can save.

torchrun gives its processes 30 s when it is told to stop, and then ends with an error of its own. So a signal goes past
it to the processes, which save and end with 0, and torchrun after them. Nothing here needs torch.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from workload.errors import WorkloadError

FOLDER = "WORKLOAD_RANKS"  # environment: where each rank says its pid, and that it ended well
ENDED_WELL = "0"
WORDS = ("gpu", "cpu", "auto")  # torchrun's: one for each GPU, or core, there is
GRACE_S = 600  # a checkpoint of the largest model on a slow disk
SAME_S = 10.0  # signals within this time mean the same: a service manager tells every process, and so do we
PR_SET_PDEATHSIG = 1


def is_worker(environ: Mapping[str, str]) -> bool:
    """Whether torchrun started this process."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def launch(arguments: Sequence[str], processes: str) -> int:
    """``python -m workload ARGUMENTS`` in that many processes on this machine; its exit status.

    processes: a number, or a word of torchrun. SIGTERM and SIGINT let them save; a second one ends them at once.
    """
    if processes not in WORDS and not (processes.isdecimal() and int(processes) > 0):
        raise WorkloadError(f"--nproc-per-node {processes}: expected a number, or {', '.join(WORDS)}")
    with tempfile.TemporaryDirectory(prefix="workload-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", "workload", *arguments]
        environ = {
            "OMP_NUM_THREADS": "1",  # what torchrun would warn of and choose; each rank then sets its own
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S),
            **os.environ,
            FOLDER: name,
        }
        # A session of its own: Ctrl-C in a terminal reaches this process, and the ranks through it.
        torchrun = subprocess.Popen(command, env=environ, start_new_session=True, preexec_fn=_end_with_parent)
        told = False

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal told
            pids = [] if told else [int(text) for text in _read(folder) if text != ENDED_WELL]
            told = True
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            if not pids:  # still starting, or asked twice
                torchrun.terminate()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = torchrun.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        ended = _read(folder)
        return 0 if ended and all(text == ENDED_WELL for text in ended) else max(1, status)


@contextmanager
def rank_of_launch(environ: Mapping[str, str]) -> Iterator[Callable[[], bool]]:
    """Inside, this rank can be told to stop; yields whether it was. Use in a process that torchrun started.

    What is raised inside is told to `launch`, as is that nothing was.
    """
    asked_s = 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked_s
        if asked_s and time.monotonic() - asked_s > SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked_s = asked_s or time.monotonic()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    mine = Path(environ[FOLDER], environ["RANK"]) if FOLDER in environ else None
    if mine is not None:
        mine.write_text(str(os.getpid()))
    yield lambda: asked_s > 0
    if mine is not None:
        mine.write_text(ENDED_WELL)


def _read(folder: Path) -> list[str]:
    """What the ranks wrote so far."""
    return [text for path in sorted(folder.iterdir()) if (text := path.read_text())]


def _end_with_parent() -> None:
    """Linux: SIGTERM when the parent is gone, so that a launcher that was killed leaves no training behind."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
