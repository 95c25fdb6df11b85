"""A flat folder of Python wheels for the guest: the workload's environment without a package index.

torch is the build for CPUs, by its local version (`+cpu`), which exists in no general index: so what
this machine's own pip knows is asked first, and PyTorch's CPU index only after it. Nothing here can
fetch a CUDA build, and `check` refuses a folder that holds a piece of one.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from provision.errors import ProvisionError
from provision.rehearsal import tools

UV = "uv==0.13.9"
GUEST_PYTHON = "3.11"  # of the suite that rootfs.py installs
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17, 12, 5)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
FOR_GUEST = (
    "--only-binary=:all:",
    "--implementation=cp",
    f"--python-version={GUEST_PYTHON}",
    *(f"--abi={abi}" for abi in ("cp" + GUEST_PYTHON.replace(".", ""), "abi3", "none")),
    *(f"--platform={platform}" for platform in PLATFORMS),
)


def pip_download(stage: Path, log: Path, *words: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-input",
        "--dest",
        str(stage),
    ]
    tools.run([*command, *words], log=log)


def build_uv(stage: Path, log: Path) -> None:
    pip_download(stage, log, "--no-deps", *FOR_GUEST, UV)


def build_wheels(stage: Path, torch: str, requirements: Sequence[str], torch_index: str, log: Path) -> None:
    """torch (`torch==2.13.0+cpu`), the other requirements and all that they need."""
    try:
        pip_download(stage, log, "--no-deps", *FOR_GUEST, torch)
    except ProvisionError:
        quick = ("--retries", "1", "--timeout", "20")  # an index out of reach should not cost minutes
        pip_download(stage, log, "--no-deps", *quick, *FOR_GUEST, "--index-url", torch_index, torch)
    found = [str(path) for path in stage.glob("torch-*.whl")]
    pip_download(stage, log, *FOR_GUEST, *found, *requirements)
    check(stage)


def check(folder: Path) -> None:
    """Raises ProvisionError where the folder holds wheels of CUDA: gigabytes that nobody here can use.

    nvidia-ml-py reads a card's sensors, is small, and does nothing where there is no card.
    """
    foreign = [
        path.name
        for path in folder.glob("*.whl")
        if path.name.startswith(("nvidia_", "triton", "cuda_")) and not path.name.startswith("nvidia_ml_py-")
    ]
    if foreign or not list(folder.glob("torch-*+cpu-*.whl")):
        raise ProvisionError(
            f"The wheel folder is not the one for CPUs: {', '.join(foreign) or 'no torch-…+cpu wheel in it'}.",
            "Check python.torch and python.torch_index in machines/rehearsal.toml.",
        )


def wheel(folder: Path, name: str) -> Path:
    """The one wheel of that distribution in the folder."""
    (found,) = folder.glob(f"{name}-*.whl")
    return found
