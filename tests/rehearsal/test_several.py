"""Several machines in one command, two of them real ones in software: each goes its own way to the end."""

import os
import re
import shutil
import socket
import subprocess

import pytest
from rich.console import Console

from provision.pins import fingerprint_of, parse_key
from provision.rehearsal.bed import NAME, Bed
from provision.rehearsal.loop import Rehearsal, fab_command
from tests.rehearsal.hardware import forget

pytestmark = pytest.mark.rehearsal
DEADLINE_S = 5400


@pytest.mark.rotating
def test_two_machines_at_once_and_one_that_is_off(bed: Bed) -> None:
    """Both are installed, rebooted, found and verified; the third does not stop them, and the exit code tells of it."""
    rehearsals = {
        name: Rehearsal(bed, bed.machine(f"several-{name}"), Console(quiet=True))
        for name in ("left", "right")
    }
    folder = bed.folder / "vm" / "several"
    machines, state = folder / "machines", folder / "logs"
    shutil.rmtree(folder, ignore_errors=True)
    machines.mkdir(parents=True)
    for name, rehearsal in rehearsals.items():
        rehearsal.boot(cold=False)
        for ending in (".toml", ".local.toml"):
            shutil.copy(rehearsal.machines / f"{NAME}{ending}", machines / f"{name}{ending}")
        shutil.copy(rehearsal.machines / "defaults.toml", machines)
    with socket.socket() as nobody:  # bound, so that nothing else answers there
        nobody.bind(("127.0.0.1", 0))
        text = (machines / "left.local.toml").read_text()
        port = nobody.getsockname()[1]
        shutil.copy(machines / "left.toml", machines / "absent.toml")
        (machines / "absent.local.toml").write_text(re.sub(r"(?m)^port = \d+", f"port = {port}", text))
        environment = {**os.environ, "METAL_MACHINES": str(machines), "XDG_STATE_HOME": str(state)}

        def fab(hosts: str, *words: str) -> subprocess.CompletedProcess[str]:
            command = fab_command(*words, name=hosts)
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=environment,
                timeout=DEADLINE_S,
                check=False,
            )

        # What a person sees on each console, given once; several machines at once ask nobody.
        fingerprint = fingerprint_of(parse_key(bed.parts.keys.host_line))
        for name in rehearsals:
            seen = fab(name, "plan", "--fingerprint", fingerprint)
            assert seen.returncode == 0, seen.stdout + seen.stderr
        done = fab("left,absent,right", "provision")
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    summary = said[said.rindex(" machine ") :]
    for name in rehearsals:
        assert re.search(rf"(?m)^ {name} +ok ", summary), said[-6000:]
        assert re.search(rf"(?m)^{name} +\| .*verified", said), said[-6000:]
        (log,) = (state / "metal-to-model" / name).glob("*-fab-provision.log")
        assert "verified" in log.read_text()
    assert re.search(r"(?m)^ absent +failed ", summary), said[-6000:]
    again = fab("left,right", "provision")
    assert again.returncode == 0, again.stdout + again.stderr
    for name, rehearsal in rehearsals.items():
        assert re.search(rf"(?m)^{name} +\| .*[Nn]othing to do", again.stdout), again.stdout
        forget(rehearsal.vm)
