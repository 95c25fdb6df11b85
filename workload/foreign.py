"""Reading weights that others wrote: nothing in a file is run, and nothing of it is believed.

A file is safetensors, which holds tensors alone, or torch's, of which only tensors and plain values are unpickled
(``weights_only``). `read` finds the tensors, takes wrappers' prefixes off their names, and notes what the file says
of its model; whether that is true is for convert.py to find out.
"""

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workload.checkpoint import MANIFEST
from workload.config import ModelConfig
from workload.errors import WorkloadError

HF_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "ckpt.pt")
# Wrappers put themselves before a name: torch.compile, DistributedDataParallel, and GPT2LMHeadModel around GPT2Model.
PREFIX = re.compile(r"^(?:(?:_orig_mod|module|transformer)\.)+")
# Causal masks that older versions kept among the weights.
MASK = re.compile(r"^(?:h\.\d+\.attn\.(?:bias|masked_bias)|trf_blocks\.\d+\.att\.mask)$")
FETCH_HINT = "fetch or save it again"


@dataclass(frozen=True)
class Source:
    """A foreign file as read: nothing of it is believed yet."""

    path: Path  # named in errors
    kind: str
    tensors: dict[str, Tensor]  # without wrappers' prefixes and masks
    said: dict[str, Any]  # what it says of its model, by ModelConfig's names


def read(path: Path) -> Source:
    """Every tensor of `path`, to the CPU, and what it says of itself. Only data is unpickled."""
    file = path
    if path.is_dir():
        if (path / MANIFEST).exists() or (path / "checkpoints").is_dir():
            raise WorkloadError(
                f"{path} is a run or a checkpoint already", f"python -m workload sample {path}"
            )
        file = next((path / name for name in HF_FOLDER if (path / name).is_file()), path)
    if not file.is_file():
        seen = (
            f"a folder without {' or '.join(HF_FOLDER)}"
            if path.is_dir()
            else "there is no such file or folder"
        )
        raise WorkloadError(
            f"{path}: {seen}", "import reads a Hugging Face folder, a ckpt.pt or a .safetensors"
        )
    content: dict[str, Any]
    about: dict[str, str] = {}
    if file.name.endswith(".index.json"):
        content = _read_shards(file)
    elif _is_safetensors(file):
        content, about = _read_safetensors(file)
    else:
        content = _read_torch(file)
    said: dict[str, Any] = {}
    if "model_args" in content:
        said, content = _parse_nanogpt(content, file), content.get("model", {})
    tensors = _find_tensors(content, file)
    if any(name.startswith("trf_blocks.") for name in tensors):
        return Source(file, "book", tensors, _parse_book(about, file))
    if not any(name.startswith("h.") for name in tensors):
        seen = f"{len(tensors)} tensors, {', '.join(sorted(tensors)[:4])} …" if tensors else "no tensors"
        raise WorkloadError(
            f"{file}: {seen}: not a GPT-2 by any of the names that are known here",
            "expected h.0.attn.c_attn.weight (Hugging Face, nanoGPT) or trf_blocks.0.att.W_query.weight (the book)",
        )
    if said:
        return Source(file, "nanogpt", tensors, said)
    beside = file.parent / "config.json"
    said = _parse_hf(_read_json(beside), beside) if beside.is_file() else {}
    # (in, 3·in) or (3·in, in): which of the two it is needs no word from the file
    shape = tuple(getattr(tensors.get("h.0.attn.c_attn.weight"), "shape", ()))
    linear = len(shape) == 2 and shape[0] == 3 * shape[1]
    return Source(file, "nanogpt" if linear else "hf", tensors, said)


def _is_safetensors(file: Path) -> bool:
    """By its first bytes: 8 of length, then JSON; a torch file is a zip archive or a pickle."""
    with file.open("rb") as opened:
        head = opened.read(9)
    if head[8:9] == b"{":
        return True
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return False
    size = file.stat().st_size
    raise WorkloadError(f"{file}: {size:,} bytes that are neither safetensors nor torch's format", FETCH_HINT)


def _read_safetensors(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise WorkloadError(f"{file}: not whole: {error}", FETCH_HINT) from error


def _read_shards(index: Path) -> dict[str, Any]:
    """The files that a Hugging Face index names, together."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise WorkloadError(f"{index}: it has no weight_map", FETCH_HINT)
    tensors: dict[str, Any] = {}
    for name in sorted(map(str, set(places.values()))):
        shard = index.parent / Path(name).name  # beside the index, whatever it says
        if not shard.is_file():
            raise WorkloadError(f"{index}: {name} is missing beside it", FETCH_HINT)
        tensors |= _read_safetensors(shard)[0]
    return tensors


def _read_torch(file: Path) -> dict[str, Any]:
    # A broken or hostile file raises whatever it likes out of the unpickler; none of it is more than "no".
    try:
        content = torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception as error:
        raise WorkloadError(
            f"{file}: not whole, or it holds more than tensors and plain values, which would be code to run: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else error!r}",
            f"{FETCH_HINT}, as tensors alone: torch.save(model.state_dict(), …)",
        ) from error
    if not isinstance(content, dict):
        raise WorkloadError(f"{file}: it holds one {type(content).__name__}, not tensors by name", FETCH_HINT)
    return {str(key): value for key, value in content.items()}


def _find_tensors(content: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """The weights in `content` or one level down, under the names of the bare model."""
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        name = PREFIX.sub("", key)
        if not isinstance(value, Tensor):
            raise WorkloadError(f"{file}: {key} is no tensor but a {type(value).__name__}", FETCH_HINT)
        if name in tensors:
            raise WorkloadError(f"{file}: {name} is in it twice, once as {key}", FETCH_HINT)
        if not MASK.match(name):
            tensors[name] = value
    return tensors


def _parse_hf(document: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """config.json. Raises when it asks for what GPT-2 has not."""
    wanted: dict[str, tuple[object, ...]] = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "n_inner": (None, 4 * document["n_embd"] if isinstance(document.get("n_embd"), int) else None),
    }
    wrong = [
        f"{where}: {key} is {document[key]!r}; a GPT-2 has {' or '.join(map(repr, dict.fromkeys(values)))}"
        for key, values in wanted.items()
        if key in document and document[key] not in values
    ]
    if wrong:
        raise WorkloadError("\n".join(wrong), "only GPT-2 is read here")
    said = {
        "n_layer": document.get("n_layer"),
        "n_head": document.get("n_head"),
        "n_embd": document.get("n_embd"),
        "n_ctx": document.get("n_positions", document.get("n_ctx")),
        "vocab_size": document.get("vocab_size"),
        "dropout": document.get("resid_pdrop"),
        "tied": document.get("tie_word_embeddings", True),
        "qkv_bias": document.get("qkv_bias"),
        "gelu_tanh": document.get("activation_function", "gelu_new") != "gelu",
        "init_std": document.get("initializer_range"),
    }
    return _typed(said, where)


def _parse_nanogpt(content: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """model_args. Its GELU is the exact one (since 2023-05-17; ``--set gelu_tanh=true`` for checkpoints from before)."""
    model_args, config = content["model_args"], content.get("config")
    if not isinstance(model_args, dict):
        raise WorkloadError(f"{where}: model_args is no table", FETCH_HINT)
    extra = config if isinstance(config, dict) else {}
    said = {
        name: model_args.get(name) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "dropout")
    } | {
        "n_ctx": model_args.get("block_size"),
        "tied": True,
        "qkv_bias": extra.get("qkv_bias"),
        "gelu_tanh": extra.get("gelu_tanh", False),
        "init_std": extra.get("init_std"),
    }
    return _typed(said, where)


def _parse_book(about: Mapping[str, str], where: Path) -> dict[str, Any]:
    """The safetensors' metadata, when it is of `export`; files of others have none."""
    try:
        document = json.loads(about.get("config", "{}"))
    except ValueError:
        return {}
    if not isinstance(document, dict):
        return {}
    names = {
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "emb_dim": "n_embd",
        "context_length": "n_ctx",
        "drop_rate": "dropout",
    }
    return _typed({names.get(str(key), str(key)): value for key, value in document.items()}, where)


def _typed(said: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """What was said, without what was not; every value of the type that ModelConfig has for it, or an error."""
    types = {item.name: item.type for item in fields(ModelConfig)}
    values = {}
    for name, value in said.items():
        kind = types.get(name)
        if value is None or kind is None:
            continue
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise WorkloadError(
                f"{where}: {name} is {value!r}, which is no {getattr(kind, '__name__', kind)}", FETCH_HINT
            )
        values[name] = value
    return values


def _read_json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkloadError(f"{file}: not JSON: {error}", FETCH_HINT) from error
    if not isinstance(document, dict):
        raise WorkloadError(f"{file}: a table was expected", FETCH_HINT)
    return document
