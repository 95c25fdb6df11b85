"""`fetch-checkpoints --watch`: what a run saves comes home as it is saved, until the run has ended."""

import time
from collections.abc import Callable
from pathlib import Path

from provision.errors import ConnectionLost, Unreachable
from provision.fetch import Fetched, demand_which, fetch_checkpoints, is_here, list_remote
from provision.host import RECONNECT_S, Host
from provision.machine import Machine

POLL_S = 15.0  # between two looks, an exec each

Say = Callable[[str], object]


def watch(
    host: Host,
    machine: Machine,
    destination: Path,
    run: str = "",
    which: str = "all",
    *,
    poll_s: float = POLL_S,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    say: Say = print,
) -> Fetched:
    """Fetch, and again whenever there is a new checkpoint, until no run that is meant is at work; then once more.

    Metrics and reports come with each checkpoint and at the end. A lost connection is dialled again for an hour.
    Raises ProvisionError as `fetch_checkpoints` does.
    """
    demand_which(which)
    lost_at: float | None = None
    done: Fetched | None = None
    while True:
        try:
            if done is None or has_news(host, machine, destination, run, which):
                done = fetch_checkpoints(host, machine, destination, run, which, say=say)
                if not done.at_work:
                    return done
            lost_at = None
        except (ConnectionLost, Unreachable) as error:
            lost_at = clock() if lost_at is None else lost_at
            if clock() - lost_at > RECONNECT_S:
                raise
            say(f"{error.message.splitlines()[0]} Looking again in {poll_s:g} s; what arrived is kept.")
        sleep(poll_s)


def has_news(host: Host, machine: Machine, destination: Path, run: str, which: str) -> bool:
    """One exec: whether a checkpoint is missing here, or nothing is at work any more."""
    listing = list_remote(host, machine, run)
    chosen = [listed for found in listing.runs.values() for listed in found.chosen(which)]
    at_work = any(found.at_work for found in listing.runs.values())
    return not at_work or not all(is_here(destination, listed) for listed in chosen)
