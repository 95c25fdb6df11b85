"""One bed for all tests of a session, in the cache that `make rehearsal` uses too.

What is marked `rehearsal` needs root (or sudo), QEMU, OVMF and the other programs of
provision/rehearsal/tools.py, which `python -m provision.rehearsal setup` installs.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Done:
    """A rehearsal that has ended: its exit status, what it printed, and the folder that it was called in."""

    status: int
    text: str
    folder: Path


@pytest.fixture(scope="session")
def whole_way(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """`make rehearsal`. The machine is off afterwards, and stays as it was left for tests that need an installed one."""
    folder = tmp_path_factory.mktemp("whole-way")
    command = [sys.executable, "-m", "provision.rehearsal", "run", "--cache", str(bed.folder)]
    with (folder / "output").open("wb+") as output:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        )
        output.seek(0)
        return Done(done.returncode, output.read().decode(), folder)


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
