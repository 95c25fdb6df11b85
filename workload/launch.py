"""``--nproc-per-node``, ``--nnodes``: torchrun started by the command itself, its processes stopped so that they can save.

torchrun gives its processes 30 s when it is told to stop, and then ends with an error of its own. So a signal goes past
it to the processes, which save and end with 0, and torchrun after them. Nothing here needs torch.

Of several machines each gives the command once, and torchrun waits until all are there (its static rendezvous, on the
first of them). What ends on one of them ends on all; each is then started again by whoever started it, and they meet
again. What ended here only because of another machine ends with ELSEWHERE, which asks for that.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from workload.errors import WorkloadError

FOLDER = "WORKLOAD_RANKS"  # environment: where each rank says its pid, and that it ended well
ENDED_WELL = "0"
STOPPED_ELSEWHERE = "stopped"  # and saved, as another machine was told to stop
LOST_OTHERS = "lost"
ELSEWHERE = (
    75  # exit status, "try again" of sysexits.h: another machine was lost or told to stop, this was not
)
WORDS = ("gpu", "cpu", "auto")  # torchrun's: one for each GPU, or core, there is
WAIT_S = 24 * 3600  # for other machines: one that stays off until somebody is back in the morning
GRACE_S = 600  # a checkpoint of the largest model on a slow disk
SAME_S = 10.0  # signals within this time mean the same: a service manager tells every process, and so do we
PR_SET_PDEATHSIG = 1


class OthersLost(WorkloadError):
    """Ranks that are gone, seen from one that is not."""


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, seen from one of them. torchrun calls them nodes."""

    count: int = 1
    rank: int = 0  # of this one; number 0 writes everything
    endpoint: str = ""  # HOST:PORT of number 0, as the others reach it

    def options(self) -> list[str]:
        """Of torchrun."""
        if self.count == 1:
            return ["--standalone"]
        host, _, port = self.endpoint.rpartition(":")
        return [
            f"--nnodes={self.count}",
            f"--node-rank={self.rank}",
            f"--master-addr={host}",
            f"--master-port={port}",
            f"--rdzv-conf=timeout={WAIT_S}",
        ]


def checked_nodes(count: int, rank: int, endpoint: str) -> Nodes:
    """Raises WorkloadError where they are not those of a machine among `count`."""
    host, _, port = endpoint.rpartition(":")
    if count < 1 or not 0 <= rank < count:
        raise WorkloadError(f"--node-rank {rank}: expected 0 … {count - 1}, as there are --nnodes {count}")
    if count > 1 and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise WorkloadError(
            f"--rendezvous {endpoint}: expected HOST:PORT",
            "an address of machine 0 that the others reach, and a port that is free there",
        )
    return Nodes(count, rank, endpoint)


def is_worker(environ: Mapping[str, str]) -> bool:
    """Whether torchrun started this process."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def launch(arguments: Sequence[str], processes: str, nodes: Nodes | None = None) -> int:
    """``python -m workload ARGUMENTS`` in that many processes on this machine; its exit status.

    processes: a number, or a word of torchrun. nodes: this machine's place among others that do the same. SIGTERM and
    SIGINT let them save; a second one ends them at once.
    """
    nodes = nodes or Nodes()
    if processes not in WORDS and not (processes.isdecimal() and int(processes) > 0):
        raise WorkloadError(f"--nproc-per-node {processes}: expected a number, or {', '.join(WORDS)}")
    with tempfile.TemporaryDirectory(prefix="workload-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "torch.distributed.run", *nodes.options()]
        command += [f"--nproc-per-node={processes}", "-m", "workload", *arguments]
        environ = {
            "OMP_NUM_THREADS": "1",  # what torchrun would warn of and choose; each rank then sets its own
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S),
            # It warns of addresses without a name.
            **({"TORCH_CPP_LOG_LEVEL": "ERROR"} if nodes.count > 1 else {}),
            **os.environ,
            FOLDER: name,
        }
        if nodes.count > 1:
            what = f"machine {nodes.rank + 1} of {nodes.count}; they meet at {nodes.endpoint}"
            print(f"nodes    {what}, and wait for one another up to {WAIT_S // 3600} h", flush=True)
        # A session of its own: Ctrl-C in a terminal reaches this process, and the ranks through it.
        torchrun = subprocess.Popen(command, env=environ, start_new_session=True, preexec_fn=_end_with_parent)
        told = False

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal told
            pids = (
                []
                if told
                else [int(text) for text in _read(folder) if text.isdecimal() and text != ENDED_WELL]
            )
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
        if nodes.count > 1 and not ended and not told:  # torchrun's own error, a traceback, is above
            print(
                f"the machines did not come together at {nodes.endpoint}, an address of machine 0 that all others must "
                "reach, with a port that is free there",
                file=sys.stderr,
                flush=True,
            )
        return exit_status(ended, status, told=told, nodes=nodes)


def exit_status(ended: Sequence[str], torchrun: int, *, told: bool, nodes: Nodes) -> int:
    """What `launch` ends with. ended: the words of the ranks here; none: they had not begun. torchrun: its status."""
    if ended and all(text == ENDED_WELL for text in ended):
        return 0
    if told and not ended:
        return 128 + signal.SIGTERM
    if nodes.count > 1 and all(text in (ENDED_WELL, STOPPED_ELSEWHERE, LOST_OTHERS) for text in ended):
        if not told:
            return ELSEWHERE
        if LOST_OTHERS not in ended:
            return 0
    return max(1, torchrun)


@dataclass
class Rank:
    """What a rank knows of how it is to end."""

    asked_s: float = 0.0  # when it was told to stop; 0: it was not
    stopped_elsewhere: bool = False  # set by who finds that another machine's ranks were
    mine: Path | None = None  # where it says so

    def should_stop(self) -> bool:
        return self.asked_s > 0

    def tell(self, word: str) -> None:
        """For `launch`."""
        if self.mine is not None:
            self.mine.write_text(word)

    def end_as_lost(self) -> None:
        """At once, from any thread: the others are gone, and the one that trains may wait for them for long."""
        self.tell(LOST_OTHERS)
        os._exit(1)


@contextmanager
def rank_of_launch(environ: Mapping[str, str]) -> Iterator[Rank]:
    """Inside, this rank can be told to stop; yields whether it was. Use in a process that torchrun started.

    What is raised inside is told to `launch`, as is that nothing was.
    """
    rank = Rank(mine=Path(environ[FOLDER], environ["RANK"]) if FOLDER in environ else None)

    def ask(number: int, frame: FrameType | None) -> None:
        if rank.asked_s and time.monotonic() - rank.asked_s > SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        rank.asked_s = rank.asked_s or time.monotonic()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    rank.tell(str(os.getpid()))
    try:
        yield rank
    except OthersLost:
        rank.tell(LOST_OTHERS)
        raise
    rank.tell(STOPPED_ELSEWHERE if rank.stopped_elsewhere else ENDED_WELL)


def _read(folder: Path) -> list[str]:
    """What the ranks wrote so far."""
    return [text for path in sorted(folder.iterdir()) if (text := path.read_text())]


def _end_with_parent() -> None:
    """Linux: SIGTERM when the parent is gone, so that a launcher that was killed leaves no training behind."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
