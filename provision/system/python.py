"""Python environments: that of the training, /opt/metal/env, and the person's own, /opt/metal/environments/NAME."""

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from shlex import join, quote

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from provision.errors import ProvisionError
from provision.facts import Facts
from provision.machine import Machine
from provision.steps import Packages, Script, Step
from provision.system.gpu import describe, needs_legacy

PREFIX = "/opt/metal"
ENVIRONMENT = f"{PREFIX}/env"  # a link to the environment in use below /opt/metal/envs
OWN = f"{PREFIX}/environments"  # such links, by name
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# The default index's wheels carry CUDA 13, which knows nothing older than Turing. CUDA 12.6 knows Maxwell to Hopper. Torch
# is published with it up to 2.14: https://github.com/pytorch/pytorch/issues/190385; for 2.9 to 2.14 these architectures
# are documented: https://github.com/pytorch/pytorch/pull/164471, /pull/175253, /pull/182849, /issues/190355.
LEGACY_INDEX = "https://download.pytorch.org/whl/cu126"
LEGACY_TORCH = tuple(f"2.{minor}.{patch}+cu126" for minor in range(9, 15) for patch in range(10))


OF_TORCH = ("torch", "torchvision", "torchaudio")  # one index has wheels of all three that fit each other


def torch_index(machine: Machine, facts: Facts) -> str:
    """Index URL for torch's wheels; "" for the default index, whose Linux wheels carry CUDA 13 (Turing and newer)."""
    if machine.python.torch_index or machine.python.offline:
        return machine.python.torch_index
    if not facts.gpus or machine.gpu.driver == "none":
        return CPU_INDEX
    return LEGACY_INDEX if needs_legacy(facts.gpus) else ""


def check_torch(machine: Machine, facts: Facts) -> None:
    """Refuse a python.torch of which no wheel has kernels for these cards. An index that the person chose is theirs to judge."""
    if machine.python.lock or machine.python.torch_index or torch_index(machine, facts) != LEGACY_INDEX:
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


@dataclass(frozen=True)
class Environment:
    """What shall be in an environment: exactly `lock` (the text of a requirements file), or else `requirements`.

    `name` is the Step's; `link` leads to the environment in use; `index` is where torch and its relatives come from.
    """

    name: str
    link: str
    interpreter: str
    index: str
    requirements: tuple[str, ...]
    lock: str = ""

    @property
    def managed(self) -> bool:
        """Whether uv brings the interpreter."""
        return not self.interpreter.startswith("/")

    @property
    def folder(self) -> str:
        """Named after what is in it: the same wishes lead to the same folder, and nothing is made again."""
        first = next((item for item in self.requirements if name_of(item) == "torch"), "")
        others = tuple(item for item in self.requirements if item != first)
        key = repr(
            (self.interpreter, self.lock) if self.lock else (self.interpreter, first, self.index, others)
        )
        return f"{PREFIX}/envs/{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def python(machine: Machine, facts: Facts) -> Iterator[Step]:
    """uv, and the environment of the training."""
    check_torch(machine, facts)
    if facts.system != "installed":
        return
    wanted = machine.python
    environment = Environment(
        name="python environment",
        link=ENVIRONMENT,
        interpreter=wanted.interpreter,
        index=torch_index(machine, facts),
        requirements=(wanted.torch, *wanted.packages),
        lock=wanted.lock,
    )
    system_wide = any(not each.managed for each in (environment, *own_wanted(machine, facts)))
    yield Packages(
        "uv",
        "gcc",
        *(("python",) if system_wide else ()),
        why="makes Python environments; torch.compile needs a compiler",
    )
    # Without importing torch, which takes seconds: is there a Python that runs, and torch's files?
    finds_torch = 'import importlib.util as u; assert u.find_spec("torch")'
    yield replace(make(environment, machine, finds_torch), disturbs_runs=True)


def own_environments(machine: Machine, facts: Facts) -> Iterator[Step]:
    """Those of the machine file, for whatever the person works with beside the training."""
    if facts.system == "installed":
        for environment in own_wanted(machine, facts):
            yield make(environment, machine, "")


def own_wanted(machine: Machine, facts: Facts) -> list[Environment]:
    return [
        Environment(
            name=f"python environment {name}",
            link=f"{OWN}/{name}",
            interpreter=wanted.interpreter or machine.python.interpreter,
            index=torch_index(machine, facts),
            requirements=wanted.requirements,
            lock=wanted.lock,
        )
        for name, wanted in machine.environments.items()
    ]


def name_of(requirement: str) -> str:
    """Of the project that it asks for, as indexes write it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return canonicalize_name(found[0]) if found else ""


# uv does not sync what it downloads. After a power cut its cache has empty files, which it takes for wheels and fails
# with for ever. A connection or an attempt that was cut keeps its downloads.
UNSYNCED = f"""\
boot=$(< /proc/sys/kernel/random/boot_id)
mkdir -p {PREFIX}/envs
if [[ -e {PREFIX}/unsynced && $(< {PREFIX}/unsynced) != "$boot" ]]; then
  echo 'The machine lost its power in the middle of this: downloading again'
  rm -rf {PREFIX}/cache "$folder.lock"
fi
echo "$boot" > {PREFIX}/unsynced
sync {PREFIX}/unsynced"""

# What no link leads to and no process has open: an interpreter or a library of it would be among its maps.
PRUNE = f"""\
used=$(readlink {ENVIRONMENT} {OWN}/* || true)
for old in {PREFIX}/envs/*; do
  of=${{old%.lock}}
  of=${{of%.python}}
  if grep -qxF "$of" <<< "$used"; then continue; fi
  if grep -qsF "$of" /proc/[0-9]*/maps; then echo "$old is in use, and stays until an environment changes again"; continue; fi
  rm -rf "$old"
done"""


def make(environment: Environment, machine: Machine, test: str) -> Step:
    """Made beside the one in use, with an interpreter of its own; put in its place by one rename, when all is on the disk.

    So whatever ends it in the middle, the old one works. What was chosen is kept beside it as FOLDER.lock: should the same
    environment have to be made again, it gets the very same packages. `test`: Python that must run in it.
    """
    folder, link = environment.folder, environment.link
    names = " ".join(environment.requirements) or "as its lock says"
    lines = [
        "umask 022",
        f"folder={folder}",
        f"export UV_CACHE_DIR={PREFIX}/cache UV_PYTHON_CACHE_DIR={PREFIX}/cache/python UV_PYTHON_INSTALL_DIR=$folder.python HOME=/root",
        f"export UV_PYTHON_PREFERENCE={'only-managed' if environment.managed else 'only-system'}",
        *mirror(machine),
        UNSYNCED,
        'rm -rf "$folder" "$folder.python"',
        *([join(["uv", "python", "install", environment.interpreter])] if environment.managed else []),
        join(["uv", "venv", "--python", environment.interpreter]) + ' "$folder"',
        *fill(environment, machine),
        "sync",  # before the link: what it leads to is all on the disk
        f"rm {PREFIX}/unsynced",
        *([f"mkdir -p {OWN}"] if link.startswith(OWN) else []),
        f"ln -sfnT {folder} {link}.new",
        f"mv -T {link}.new {link}",
        PRUNE,
    ]
    return Script(
        environment.name,
        why=f"{'locked' if environment.lock else names}; Python {environment.interpreter}; "
        f"torch from {environment.index or 'the default index'}",
        probe=f"{link}/bin/python -c {quote(test)} && readlink {link}",
        expect=folder,
        script="\n".join(lines),
    )


def mirror(machine: Machine) -> list[str]:
    wanted = machine.python.interpreter_mirror
    return [f"export UV_PYTHON_INSTALL_MIRROR={quote(wanted)}"] if wanted else []


def fill(environment: Environment, machine: Machine) -> list[str]:
    """Bash that puts the packages into "$folder"."""
    wanted = machine.python
    sources = ["--no-index"] if wanted.offline else []
    if wanted.find_links:
        sources += ["--find-links", wanted.find_links]
    elsewhere = ["--index-url", wanted.index] if wanted.index and not wanted.offline else []
    torch = ["--index-url", environment.index] if environment.index and not wanted.offline else elsewhere
    into = '--python "$folder/bin/python"'
    if environment.lock:
        # Every version is named, so that it does not matter which of the indexes is asked first.
        both = ["--extra-index-url", environment.index, "--index-strategy", "unsafe-best-match"]
        indexes = [*elsewhere, *(both if torch != elsewhere else [])]
        hashes = ["--require-hashes"] if "--hash=" in environment.lock else []
        coded = base64.b64encode(environment.lock.encode()).decode()
        return [
            f'base64 -d <<< {coded} > "$folder.lock"',
            f'{join(["uv", "pip", "sync", *sources, *indexes, *hashes])} {into} "$folder.lock"',
        ]
    install, all_of_it = ["uv", "pip", "install", *sources], environment.requirements
    special = [item for item in all_of_it if name_of(item) in OF_TORCH]
    return [
        # As constraints, so that what is made again is made in the same way, to the last byte.
        'held=()\n[[ ! -s $folder.lock ]] || held=(--constraint "$folder.lock")',
        *([f'{join([*install, *torch])} {into} "${{held[@]}}" {join(special)}'] if special else []),
        f'{join([*install, *elsewhere])} {into} "${{held[@]}}" {join(all_of_it)}',
        'uv pip freeze --python "$folder/bin/python" > "$folder.lock.new"',
        'mv "$folder.lock.new" "$folder.lock"',
    ]
