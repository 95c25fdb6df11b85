"""The Python environment that the training runs in: /opt/metal/env."""

import hashlib
from collections.abc import Iterator
from shlex import join

from packaging.requirements import InvalidRequirement, Requirement

from provision.errors import ProvisionError
from provision.facts import Facts
from provision.machine import Machine
from provision.steps import Packages, Script, Step
from provision.system.gpu import describe, needs_legacy

PREFIX = "/opt/metal"
ENVIRONMENT = f"{PREFIX}/env"  # a link to the environment in use below /opt/metal/envs
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# uv does not sync what it downloads. After a power cut its cache has empty files, which it takes for wheels and fails
# with for ever, and so may an interpreter. A connection or an attempt that was cut keeps its downloads.
UNSYNCED = f"""\
boot=$(< /proc/sys/kernel/random/boot_id) anew=
mkdir -p {PREFIX}
if [[ -e {PREFIX}/unsynced && $(< {PREFIX}/unsynced) != "$boot" ]]; then
  echo 'The machine lost its power in the middle of this: downloading again'
  rm -rf {PREFIX}/cache
  anew=--reinstall
fi
echo "$boot" > {PREFIX}/unsynced
sync {PREFIX}/unsynced"""


# The default index's wheels carry CUDA 13, which knows nothing older than Turing. CUDA 12.6 knows Maxwell to Hopper. Torch
# is published with it up to 2.14: https://github.com/pytorch/pytorch/issues/190385; for 2.9 to 2.14 these architectures
# are documented: https://github.com/pytorch/pytorch/pull/164471, /pull/175253, /pull/182849, /issues/190355.
LEGACY_INDEX = "https://download.pytorch.org/whl/cu126"
LEGACY_TORCH = tuple(f"2.{minor}.{patch}+cu126" for minor in range(9, 15) for patch in range(10))


def torch_index(machine: Machine, facts: Facts) -> str:
    """Index URL for torch's wheels; "" for the default index, whose Linux wheels carry CUDA 13 (Turing and newer)."""
    if machine.python.torch_index or machine.python.offline:
        return machine.python.torch_index
    if not facts.gpus or machine.gpu.driver == "none":
        return CPU_INDEX
    return LEGACY_INDEX if needs_legacy(facts.gpus) else ""


def check_torch(machine: Machine, facts: Facts) -> None:
    """Refuse a python.torch of which no wheel has kernels for these cards. An index that the person chose is theirs to judge."""
    if machine.python.torch_index or torch_index(machine, facts) != LEGACY_INDEX:
        return
    wanted = machine.python.torch
    try:
        requirement = Requirement(wanted)
    except InvalidRequirement as error:
        raise ProvisionError(f"python.torch {wanted!r} is not a requirement: {error}") from None
    if requirement.url or any(version in requirement.specifier for version in LEGACY_TORCH):
        return
    raise ProvisionError(
        f"python.torch is {wanted!r}, and none of its wheels has kernels for {describe(facts.gpus)}: torch is published with "
        "CUDA 12.6, the last for cards older than Turing, from 2.9 to 2.14.",
        'Set in the machine file: [python] torch = "torch==2.14.*" (or 2.13), or a torch_index of your own.',
    )


def python(machine: Machine, facts: Facts) -> Iterator[Step]:
    """uv, an interpreter and one environment, made beside the one in use and put in its place by one rename."""
    check_torch(machine, facts)
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
        UNSYNCED,
        f"rm -rf {folder}",
        f"mkdir -p {PREFIX}/envs",
        *([join(["uv", "python", "install", wanted.interpreter]) + " $anew"] if managed else []),
        join(["uv", "venv", "--python", wanted.interpreter, folder]),
        join(first),
        join([*install, wanted.torch, *wanted.packages]),
        "sync",  # before the link: what it leads to is all on the disk
        f"rm {PREFIX}/unsynced",
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
