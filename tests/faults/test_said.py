"""What a failed Step says about its cause, by the real programs: a file system that is full, mirrors that are away."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from provision.machine import Machine
from provision.rehearsal.server import Server
from provision.steps import Plan, Planned, Script, render_apply
from provision.system.live import ask_mirrors
from tests.provision.conftest import machine
from tests.sshd import free_port

__all__ = ["machine"]


def applied(plan: Plan, root: Path, size: str) -> list[str]:
    """The lines that applying prints, where the root is a file system of this size."""
    script = f'mount -t tmpfs -o size={size} tmpfs {root}\nbash -euo pipefail -c "$1"'
    command = ["unshare", "--mount", "bash", "-c", script, "bash", render_apply(plan, str(root))]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts a small file system of its own")
def test_a_full_file_system_is_named_whatever_failed(tmp_path: Path) -> None:
    step = Script("copy", why="", probe="", script='head -c 100M /dev/zero > "$root/film" 2> /dev/null')
    plan = Plan("", (Planned(step, ""),), 0)
    full = f"{tmp_path} is full: 0 MiB are left there; make room on it"
    lines = applied(plan, tmp_path, "50M")
    assert full in lines
    assert lines[-1].startswith("@@failed 0 ")
    assert lines.index(full) < len(lines) - 1
    assert full not in applied(plan, tmp_path, "200M")
    broken = Plan("", (Planned(replace(step, script="false"), ""),), 0)
    assert not [line for line in applied(broken, tmp_path, "200M") if "is full" in line]


def test_mirrors_that_do_not_answer_are_named(tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "core/os/x86_64").mkdir(parents=True)
    (tmp_path / "core/os/x86_64/core.db").write_text("packages")
    server = Server({"arch": tmp_path}, tmp_path / "log")
    there = f"http://127.0.0.1:{server.http.server_port}/arch/$repo/os/$arch"
    away = f"http://127.0.0.1:{free_port()}/$repo/os/$arch"

    def asked(*servers: str) -> tuple[bool, str]:
        wished = replace(machine, mirror=replace(machine.mirror, servers=servers))
        script = f"{ask_mirrors(wished)}ask_mirrors"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=False
        )
        return done.returncode == 0, done.stdout

    said = f"the mirror does not answer: {away.replace('$repo', 'core').replace('$arch', 'x86_64')}/core.db\n"
    try:
        assert asked(there) == (True, "")
        assert asked(away, there) == (True, said)
        assert asked(away) == (False, said)
    finally:
        server.close()
