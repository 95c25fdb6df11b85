"""Between fab's command line and the library: which machine is meant, how to reach it, how an error is told."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fabric import Connection
from invoke.context import Context
from invoke.exceptions import Exit

from provision.errors import Locked, ProvisionError, UnknownKey, Unreachable
from provision.find import unlock_machine
from provision.host import Host, connect
from provision.machine import Machine, at_address, keep_address, known_machines, load_machine, machines_folder
from provision.nearby import find_by_name
from provision.parallel import Screen, screen

HELP = {
    "wipe": "serial of the disk that may lose all it holds; of several machines: S1,S2, each for its own disk only",
    "sweep": "after the reboot, look for it by its host key in its whole subnet too, without asking anybody",
    "restart": "even if neither kernel nor driver changed: libraries that are in use become the new ones",
    "fingerprint": "SHA256:… of the ISO's host key, read on its console (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub): then nobody is asked",
    "address": "where the machine answers now; kept in machines/NAME.local.toml",
    "preset": "one of workload/presets",
    "data": "what to train on: a file or folder here, which is sent once; demo; or a name that `python -m workload prepare` knows, made there",
    "name": "what the run's id ends in; by default the preset",
    "set": "key=value of the configuration; may be repeated",
    "detach": "start it, do not follow it",
    "resume": "id of a run that ended: it goes on from its latest checkpoint, with the settings and the source of now",
    "share": "beside another run, or with a GPU that somebody uses",
    "each": "of several machines: a run on each, instead of one over all of them",
    "run": "its id; by default the one at work, or the last one",
    "lines": "how many",
    "now": "without saving: what was done since the last checkpoint is lost",
    "prompt": "the text to go on from",
    "tokens": "how many to add",
    "open": "in the browser, too",
    "quick": "only what is seen in seconds: no disk speed, no training steps, no load",
    "which": "latest, best, all (of those that the machine keeps), or a step",
    "watch": "keep fetching what is saved until the run has ended",
}


def about(*options: str) -> dict[str, str]:
    """What --help says of these options."""
    return {option: HELP[option] for option in options}


@contextmanager
def at(
    c: Context, fingerprint: str = "", address: str = "", *, need_disk: bool = True
) -> Iterator[tuple[Host, Machine, Screen]]:
    """The machine that -H names: an open session, its file, where its output goes. Errors are made readable."""
    with readable():
        machine = load(c, address, need_disk)
        with dial(c, machine, fingerprint) as host:
            yield host, machine, replace(screen(), reach=partial(reach_by_name, c))


def reach_by_name(c: Connection, name: str) -> Host:
    """A session to another machine than the one that `c` is for."""
    return dial(c, load_machine(name, machines_folder()))


STOPPED = "Stopped watching. What was begun on the host goes on; the same command follows it again."


@contextmanager
def readable(stopped: str = STOPPED) -> Iterator[None]:
    """Errors as one message and exit code 1; Ctrl-C as 130, with what that means."""
    try:
        yield
    except ProvisionError as error:
        raise Exit(f"\nerror: {error.message}" + (f"\n{error.hint}" if error.hint else ""), 1) from None
    except KeyboardInterrupt:
        raise Exit(f"\n{stopped}", 130) from None


def named(c: Context) -> str:
    """What -H says. Without -H Fabric would run everything on this computer: refused."""
    if not isinstance(c, Connection):
        known = (
            f"Machines in {machines_folder()}: {', '.join(known_machines(machines_folder())) or 'none yet'}"
        )
        raise ProvisionError("No machine was named.", f"fab -H NAME …   {known}")
    if c.config.run.dry:
        raise ProvisionError(
            "--dry would skip reads too, and so show nothing true.", f"Use: fab -H {c.host} plan"
        )
    return str(c.original_host)  # and not c.host, which ~/.ssh/config may have replaced by an address


def here(c: Context, name: str, task: str) -> str:
    """The name that is given to a task which works on this computer alone."""
    if isinstance(c, Connection):
        raise ProvisionError(
            "This works on this computer alone, and takes the machine's name instead of -H.",
            f"fab {task} {name}",
        )
    return name


def load(c: Context, address: str = "", need_disk: bool = True) -> Machine:
    machine = load_machine(named(c), machines_folder(), need_disk=need_disk)
    return keep_address(machine, machines_folder(), address) if address else machine


def pins() -> Path:
    return machines_folder() / "known_hosts"


def dial(c: Connection, machine: Machine, fingerprint: str = "") -> Host:
    """The machine's Host, with the password and keys that fab was given.

    Where its address is silent, or somebody else's, it is looked for under its names, by the keys that are pinned.
    Where it waits for the passphrase of its disk, it gets it.
    """
    try:
        return reach(c, machine, fingerprint)
    except (Unreachable, UnknownKey):
        place = "" if fingerprint else find_by_name(machine, pins())
        if not place:
            raise
        screen().say(f"{machine.name} is at {place}, by its host key.")
        return reach(c, at_address(machine, place), fingerprint)


def reach(c: Connection, machine: Machine, fingerprint: str) -> Host:
    keys = key_files(c.connect_kwargs)
    try:
        return connect(
            machine,
            pins(),
            fingerprint=fingerprint,
            password=c.connect_kwargs.get("password") or "",
            key_files=keys,
            confirm=screen().confirm,
        )
    except Locked as error:
        screen().say(error.message)
        return unlock_machine(machine, pins(), keys, screen().console)


def key_files(connect_kwargs: Mapping[str, Any]) -> list[str]:
    """What `-i` named."""
    given = connect_kwargs.get("key_filename") or []
    return [given] if isinstance(given, str) else list(given)
