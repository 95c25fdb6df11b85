"""What a run's unit does where the disk is full: its last words are still written, and it is not started again."""

import os
import subprocess
from pathlib import Path

import pytest

from provision.runs import GAVE_UP, render_wrapper

SMALL = 'mount -t tmpfs -o size=256k tmpfs "$1" && cp "$2" "$1/script" && bash "$3" "$1"; code=$?; cat "$1/log" "$1/status"; exit $code'


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts a small file system of its own")
@pytest.mark.parametrize(("script", "full"), [("head -c 1M /dev/zero > film", True), ("exit 3", False)])
def test_a_run_that_filled_its_disk_says_so_and_ends(tmp_path: Path, script: str, full: bool) -> None:
    (tmp_path / "script").write_text(script)
    (tmp_path / "unit").write_text(render_wrapper())
    (tmp_path / "run").mkdir()
    paths = [str(tmp_path / name) for name in ("run", "script", "unit")]
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", SMALL, "bash", *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == GAVE_UP, done.stdout + done.stderr
    assert ("metal: ended with status 1: the disk is full; not started again" in done.stdout) == full
    assert done.stdout.splitlines()[-1] == ("1" if full else "3")
