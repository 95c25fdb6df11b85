"""One bed for all tests of a session, in the cache that `make rehearsal` uses too.

What is marked `rehearsal` needs root (or sudo), QEMU, OVMF and the other programs of
provision/rehearsal/tools.py, which `python -m provision.rehearsal setup` installs.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from provision.rehearsal.bed import Bed
from provision.rehearsal.loop import PROJECT
from provision.rehearsal.vm import Vm

CACHE = PROJECT / ".cache" / "rehearsal"


@pytest.fixture(scope="session")
def bed() -> Iterator[Bed]:
    with Bed(CACHE, on_build=lambda name: print(f"building {name}")) as bed:
        yield bed


@pytest.fixture
def vm(bed: Bed, request: pytest.FixtureRequest) -> Iterator[Vm]:
    """A machine that is off, in a folder named after the test."""
    machine = bed.machine(request.node.name.removeprefix("test_"))
    yield machine
    machine.kill()
    for disk in machine.disk_paths():
        disk.unlink(missing_ok=True)  # gigabytes; the logs stay


@pytest.fixture
def project() -> Path:
    return PROJECT
