"""Git as somebody, whatever this computer's configuration says."""

import subprocess
from pathlib import Path


def git(folder: Path, *arguments: str) -> str:
    words = [
        "git",
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "init.defaultBranch=master",
        *arguments,
    ]
    return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
