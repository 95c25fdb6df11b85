"""Wheels of a line of code each, and uv itself, for environments that are really made."""

import base64
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from provision.rehearsal.wheels import UV

ROOT = Path(__file__).resolve().parents[2]


def make_wheel(folder: Path, name: str, version: str, modules: int = 1) -> Path:
    """A distribution whose package has VERSION, and more modules to take a while."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {f"{name}/__init__.py": f'VERSION = "{version}"\n'}
    files |= {f"{name}/part{index}.py": f"NUMBER = {index}\n" * 50 for index in range(1, modules)}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for inner, text in files.items():
            wheel.writestr(inner, text)
    return path


@pytest.fixture(scope="session")
def uv() -> Path:
    """The folder of the uv of this computer, else of the one that the rehearsal has, fetched once."""
    if found := shutil.which("uv"):
        return Path(found).parent
    folder = ROOT / ".cache" / "uv" / UV.rpartition("=")[2]
    if not (folder / "bin/uv").exists():
        argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), UV]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"there is no uv, and it cannot be fetched: {done.stderr[-300:]}")
    return folder / "bin"
