"""The Python environment's script in a scratch folder. `uv` is a stand-in that fails on a cache with an empty file, as uv does."""

import subprocess
from dataclasses import replace
from pathlib import Path

from provision.facts import Facts
from provision.machine import Machine
from provision.system.python import PREFIX, python

UV = r"""#!/bin/bash
echo "$*" >> "${UV_CACHE_DIR%/cache}/calls"
case "$1 $2" in
  venv*) mkdir -p "${@: -1}/bin" ;;
  'pip install')
    mkdir -p "$UV_CACHE_DIR"
    [[ -z $(find "$UV_CACHE_DIR" -type f -empty) ]] || { echo 'The wheel is invalid' >&2; exit 2; }
    echo wheel > "$UV_CACHE_DIR/torch" ;;
esac
"""


def attempt(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "uv").write_text(UV)
    (folder / "bin" / "uv").chmod(0o755)
    text = script.replace(PREFIX, str(folder / "metal"))
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        capture_output=True,
        text=True,
        env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin"},
        check=False,
    )


def test_what_was_downloaded_before_a_power_cut_is_not_trusted(
    tmp_path: Path, machine: Machine, live: Facts
) -> None:
    script = list(python(machine, replace(live, system="installed")))[-1].script
    metal = tmp_path / "metal"
    assert attempt(tmp_path, script).returncode == 0
    assert not (metal / "unsynced").exists()

    # An attempt that was only cut off, in this boot, keeps what it downloaded.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    (metal / "unsynced").write_text(boot)
    (metal / "cache" / "more").write_text("bytes")
    assert attempt(tmp_path, script).returncode == 0
    assert (metal / "cache" / "more").exists()

    (metal / "cache" / "empty").write_bytes(b"")
    assert attempt(tmp_path, script).returncode == 2
    (metal / "unsynced").write_text("another boot\n")
    again = attempt(tmp_path, script)
    assert again.returncode == 0, again.stderr
    assert "lost its power" in again.stdout
    assert [path.name for path in (metal / "cache").iterdir()] == ["torch"]
    assert not list((metal / "envs").glob("*.lock.new"))
    assert (metal / "env").is_symlink()
