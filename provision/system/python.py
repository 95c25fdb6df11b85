"""The Python environment that the training runs in: /opt/metal/env."""

import hashlib
from collections.abc import Iterator
from shlex import join

from provision.facts import Facts
from provision.machine import Machine
from provision.steps import Packages, Script, Step

PREFIX = "/opt/metal"
ENVIRONMENT = f"{PREFIX}/env"  # a link to the environment in use below /opt/metal/envs
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def torch_index(machine: Machine, facts: Facts) -> str:
    """Index URL for torch's wheels; "" for the default index, whose Linux wheels carry CUDA 13 (Turing and newer)."""
    if machine.python.torch_index or machine.python.offline:
        return machine.python.torch_index
    return "" if facts.gpus and machine.gpu.driver != "none" else CPU_INDEX


def python(machine: Machine, facts: Facts) -> Iterator[Step]:
    """uv, an interpreter and one environment, made beside the one in use and put in its place by one rename."""
    if facts.system != "installed":
        return
    wanted, index = machine.python, torch_index(machine, facts)
    managed = not wanted.interpreter.startswith("/")
    key = repr((wanted.interpreter, wanted.torch, index, wanted.packages))
    folder = f"{PREFIX}/envs/{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    yield Packages(
        "uv",
        "gcc",
        *(() if managed else ("python",)),
        why="makes Python environments; torch.compile needs a compiler",
    )
    sources = ["--no-index"] if wanted.offline else []
    if wanted.find_links:
        sources += ["--find-links", wanted.find_links]
    install = ["uv", "pip", "install", "--python", f"{folder}/bin/python", *sources]
    first = [*install, *(["--index-url", index] if index and not wanted.offline else []), wanted.torch]
    lines = [
        "umask 022",
        f"export UV_CACHE_DIR={PREFIX}/cache UV_PYTHON_INSTALL_DIR={PREFIX}/python HOME=/root",
        f"export UV_PYTHON_PREFERENCE={'only-managed' if managed else 'only-system'}",
        f"rm -rf {folder}",
        f"mkdir -p {PREFIX}/envs",
        *([join(["uv", "python", "install", wanted.interpreter])] if managed else []),
        join(["uv", "venv", "--python", wanted.interpreter, folder]),
        join(first),
        join([*install, wanted.torch, *wanted.packages]),
        f"ln -sfnT {folder} {ENVIRONMENT}.new",
        f"mv -T {ENVIRONMENT}.new {ENVIRONMENT}",
    ]
    yield Script(
        "python environment",
        why=f"{wanted.torch} {' '.join(wanted.packages)}; Python {wanted.interpreter}; torch from {index or 'the default index'}",
        # Without importing torch, which takes seconds: is there a Python that runs, and torch's files?
        probe=f"{ENVIRONMENT}/bin/python -c 'import importlib.util as u; assert u.find_spec(\"torch\")' && readlink {ENVIRONMENT}",
        expect=folder,
        script="\n".join(lines),
    )
