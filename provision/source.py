"""The workload as it is sent: its files, and the name that their content gives them."""

import hashlib
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable


def package_files(package: str = "workload") -> dict[str, bytes]:
    """Relative path → content of the installed package, without what Python makes by itself."""
    found: dict[str, bytes] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                if entry.name != "__pycache__":
                    walk(entry, f"{prefix}{entry.name}/")
            elif not entry.name.endswith((".pyc", "~")) and not entry.name.startswith("."):
                found[prefix + entry.name] = entry.read_bytes()

    walk(resources.files(package), f"{package}/")
    return found


def content_hash(files: Mapping[str, bytes]) -> str:
    """Twelve hex digits that differ when a name or a byte differs."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    return digest.hexdigest()[:12]
