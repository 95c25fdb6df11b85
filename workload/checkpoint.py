"""Checkpoints that are complete or do not exist.

A checkpoint is a folder ``step-00000200`` below ``RUN/checkpoints``, complete if and only if it holds
``manifest.json``, which names every other file with its size and sha256:

    model.safetensors       weights by name, fp32 (a tied head is not stored twice)
    optimizer.safetensors   moments by parameter name; guard/…, scaler/…, micro_batch/DEVICE: see Run.extras in train.py
    random.safetensors      states of torch's generators
    state.json              step, sequences seen, steps planned, best loss, seconds, bytes of metrics.jsonl
    config.toml             the run's configuration
    manifest.json           written last

It is written as ``.step-00000200.partial``, each file synced, then renamed: a crash at any moment, or a disk that
is full, leaves the checkpoints before it untouched. A run writes them in the background: see writer.py. ``latest`` and
``best`` are one-line text files beside them, a convenience: what there is to resume from is what is complete.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workload.config import Config, parse_config, render_toml
from workload.errors import WorkloadError
from workload.files import hash_file, replace_text, sync

FORMAT = 1
MANIFEST = "manifest.json"
REMOVE_HINT = "remove that folder to go on from the one before it, or fetch it again"


@dataclass(frozen=True)
class State:
    """Where a run stands, apart from tensors."""

    step: int  # updates done
    steps: int  # updates planned
    sequences: int  # training sequences seen
    best_val_loss: float | None  # nats a token, the lowest at any evaluation that had a checkpoint
    elapsed_s: float  # of training, all parts of the run together
    metrics_bytes: int  # length of metrics.jsonl


@dataclass(frozen=True)
class Checkpoint:
    """What `load` returns. `optimizer` and `random` are empty when only the model was asked for."""

    config: Config
    state: State
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    folder: Path,
    config: Config,
    state: State,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    random: Mapping[str, Tensor],
    beside: Sequence[Path] = (),
) -> Path:
    """Write the checkpoint of `state.step` below `folder` and point ``latest`` at it; returns its path.

    One that is complete is never written again, so there is no moment without it. Files `beside` it, of which its
    state says how long they are, reach the disk before it is complete. Raises WorkloadError when the disk is full or
    fails; nothing of it is left then, and the checkpoints before it are as they were.
    """
    final = folder / folder_name(state.step)
    staging = folder / f".{final.name}.partial"
    groups = {"model": model, "optimizer": optimizer, "random": random}
    try:
        if not (final / MANIFEST).exists():
            for leftover in (final, staging):
                shutil.rmtree(leftover, ignore_errors=True)
            staging.mkdir(parents=True)
            for name, tensors in groups.items():
                cpu = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
                save_file(cpu, staging / f"{name}.safetensors")
            _complete(staging, config, state, beside)
            staging.rename(final)
            sync(folder)
        point(folder, "latest", final.name)
    except (OSError, SafetensorError) as error:  # what safetensors meets on the disk is no OSError
        shutil.rmtree(staging, ignore_errors=True)
        needed = sum(t.numel() * t.element_size() for tensors in groups.values() for t in tensors.values())
        raise _explain(error, folder, state.step, needed) from error
    return final


def _complete(staging: Path, config: Config, state: State, beside: Sequence[Path]) -> None:
    """The small files, then everything to the disk, then the manifest."""
    (staging / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    (staging / "config.toml").write_text(render_toml(config), encoding="utf-8")
    files = {}
    for path in sorted(staging.iterdir()):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    for path in beside:
        sync(path)
    manifest = {"format": FORMAT, "step": state.step, "files": files}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(staging / MANIFEST)
    sync(staging)


def _explain(error: Exception, folder: Path, step: int, needed: int) -> WorkloadError:
    """Why the checkpoint of `step`, `needed` bytes, could not be written, and what there is to go on from."""
    complete = list_complete(folder)
    newest = f"the newest complete one is {complete[-1].name}" if complete else "there is none before it"
    try:
        free = f"; it takes {needed / 1e6:,.1f} MB, {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    except OSError:
        free = ""
    return WorkloadError(
        f"the checkpoint of step {step} could not be written below {folder}: {error}{free}",
        f"{newest}; make room, then: python -m workload train --resume --out {folder.parent}",
    )


def point(folder: Path, pointer: str, name: str) -> None:
    """Make ``folder/pointer`` say `name`, at once or not at all."""
    replace_text(folder / pointer, f"{name}\n")
    sync(folder)


def list_complete(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def prune(folder: Path, *, keep: int, keep_every: int) -> list[Path]:
    """Remove what the policy does not keep: the newest `keep`, ``latest``, ``best``, multiples of `keep_every` steps.

    Also removes leftovers of saves that were cut short. Returns the checkpoints removed.
    """
    complete = list_complete(folder)
    kept = {path.name for path in complete[-keep:]} | {
        _read_pointer(folder, "latest"),
        _read_pointer(folder, "best"),
    }
    removed = []
    for path in complete:
        if path.name in kept or (keep_every and int(path.name.removeprefix("step-")) % keep_every == 0):
            continue
        remove(path)
        removed.append(path)
    for path in [*folder.glob(".*.partial"), *folder.glob("step-*")]:
        if path.is_dir() and not (path.name.startswith("step-") and (path / MANIFEST).exists()):
            shutil.rmtree(path)
    return removed


def remove(path: Path) -> None:
    """Take one checkpoint away."""
    (path / MANIFEST).unlink()  # from here on it does not exist
    shutil.rmtree(path)


def find(path: Path, which: str = "best") -> Path:
    """The checkpoint that `path` means: itself, or `which` ("best", "latest" or a step) of a run's folder.

    A run without that pointer, such as one fetched in part, gives its newest.
    """
    if (path / MANIFEST).exists():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    complete = list_complete(folder)
    if not complete:
        raise WorkloadError(
            f"{path}: neither a complete checkpoint nor a run that has one", "name a run's folder"
        )
    name = folder_name(int(which)) if which.isdecimal() else _read_pointer(folder, which)
    for checkpoint in complete:
        if checkpoint.name == name:
            return checkpoint
    if which.isdecimal():
        steps = ", ".join(str(int(c.name.removeprefix("step-"))) for c in complete)
        raise WorkloadError(f"{path}: no checkpoint of step {which}", f"there are those of steps {steps}")
    return complete[-1]


def verify(path: Path) -> None:
    """Raise one WorkloadError unless every file of the manifest is there, whole and unchanged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkloadError(f"{path}: {MANIFEST} cannot be read: {error!r}", REMOVE_HINT) from error
    if version != FORMAT:
        raise WorkloadError(f"{path}: checkpoint format {version}; this version reads format {FORMAT}")
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            raise WorkloadError(f"{path}: {name} is missing", REMOVE_HINT)
        if file.stat().st_size != size:
            raise WorkloadError(f"{file}: {file.stat().st_size} bytes, but {size} were written", REMOVE_HINT)
        if hash_file(file) != sha256:
            raise WorkloadError(f"{file}: its sha256 is not the manifest's", REMOVE_HINT)


def load(path: Path, *, only_model: bool = False) -> Checkpoint:
    """Verify, then read to the CPU."""
    verify(path)
    config = parse_config((path / "config.toml").read_text(encoding="utf-8"), where=str(path / "config.toml"))
    try:
        state = State(**json.loads((path / "state.json").read_text(encoding="utf-8")))
        model = load_file(path / "model.safetensors")
        optimizer = {} if only_model else load_file(path / "optimizer.safetensors")
        random = {} if only_model else load_file(path / "random.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise WorkloadError(f"{path}: {error}", REMOVE_HINT) from error
    return Checkpoint(config, state, model, optimizer, random)


def gather_random(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random(states: Mapping[str, Tensor], device: torch.device) -> None:
    """What `gather_random` gave, back. A run moved from CPU to GPU, or back, keeps the generator that it has there."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _read_pointer(folder: Path, pointer: str) -> str:
    try:
        return (folder / pointer).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
