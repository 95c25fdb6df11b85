"""One bed for all tests of a session, in the cache that `make rehearsal` uses too.

What is marked `rehearsal` needs root (or sudo), QEMU, OVMF and the other programs of
provision/rehearsal/tools.py, which `python -m provision.rehearsal setup` installs.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from provision.rehearsal.bed import Bed
from provision.rehearsal.loop import PROJECT
from provision.rehearsal.vm import Vm
from tests.rehearsal.hardware import today

CACHE = PROJECT / ".cache" / "rehearsal"


@pytest.hookimpl(trylast=True)  # after -k and -m: what was asked for by name is run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the machines that take minutes each and show something of their own, one each day."""
    rotating = [item for item in items if item.get_closest_marker("rotating")]
    if len(rotating) < 2 or "METAL_ALL" in os.environ:
        return
    others = [item for item in rotating if item is not rotating[today() % len(rotating)]]
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=others)


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
