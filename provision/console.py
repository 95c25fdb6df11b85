"""Between fab's command line and the library: which machine is meant, how to reach it, how an error is told."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from provision.parallel import screen


@contextmanager
def readable() -> Iterator[None]:
    """Errors as one message and exit code 1; Ctrl-C as 130."""
    try:
        yield
    except ProvisionError as error:
        raise Exit(f"\nerror: {error.message}" + (f"\n{error.hint}" if error.hint else ""), 1) from None
    except KeyboardInterrupt:
        raise Exit(
            "\nStopped watching. What was begun on the host goes on; the same command follows it again.", 130
        ) from None


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


def here(c: Context, name: str) -> str:
    """The name that is given to a task which works on this computer alone."""
    if isinstance(c, Connection):
        raise ProvisionError(
            "This works on this computer alone, and takes the machine's name instead of -H.",
            f"fab seed {name}",
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
