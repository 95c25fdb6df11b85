"""Weights from other people's files, and files that their programs read. Nothing in a file is ever run.

    kind     what it is                                        names                      matrices     head
    hf       folder: config.json, model.safetensors, for       transformer.h.0.attn…      (in, out)    wte, unless untied
             Hugging Face's GPT2LMHeadModel; also its shards,
             or the one file
    nanogpt  ckpt.pt with model, model_args (torch.save)       transformer.h.0.attn…      (out, in)    wte, always
    book     safetensors of the state of Raschka's GPTModel    trf_blocks.0.att.W_query…  (out, in)    out_head, always

`plan_parts` is the one table of names; both directions go through it. Facts come from transformers'
modeling_gpt2.py (Conv1D, `tie_word_embeddings`), nanoGPT's model.py and train.py (one matrix for embedding and
head, exact GELU, `bias = False` for layer norms, too) and "Build a Large Language Model (From Scratch)", chapters 3 to 5.

What comes in becomes a run at step 0: `sample`, `eval`, `export` and `train --resume` take it like any other.
What goes out has as many rows of vocabulary as the tokenizer has tokens; padding stays here.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from workload import checkpoint
from workload.checkpoint import Checkpoint, State
from workload.config import (
    TOKENIZERS,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    parse_config,
    render_toml,
)
from workload.errors import WorkloadError
from workload.files import sync
from workload.foreign import FETCH_HINT, Source, read
from workload.model import GPT2
from workload.runs import save_config
from workload.tokenizer import load_merges, parse_merges

KINDS = ("hf", "nanogpt", "book")
HEAD_CHANNELS = 64  # of an attention head in each of OpenAI's four sizes
BOOK = {
    "wte": "tok_emb",
    "wpe": "pos_emb",
    "ln_f": "final_norm",
    "lm_head": "out_head",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.c_proj": "att.out_proj",
    "mlp.c_fc": "ff.layers.0",
    "mlp.c_proj": "ff.layers.2",
}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # the matrices that OpenAI keeps as (in, out)


@dataclass(frozen=True)
class Part:
    """A tensor of a foreign file, and where it is in ours."""

    theirs: str
    ours: str
    third: int | None = None  # of c_attn's rows: 0 query, 1 key, 2 value; None: the whole tensor
    transposed: bool = False


@dataclass(frozen=True)
class Imported:
    kind: str
    config: Config
    notes: list[str]  # what had to be assumed


def plan_parts(config: ModelConfig, kind: str) -> list[Part]:
    """Every tensor that a file of `kind` has for such a model, without the second name of a tied head."""
    parts = []
    for ours in measure(config):
        if kind != "book":
            parts.append(Part(ours, ours, transposed=kind == "hf" and ours.endswith(CONV1D)))
            continue
        block = re.fullmatch(r"h\.(\d+)\.(.+)", ours)
        stem, _, leaf = (block[2] if block else ours).rpartition(".")
        before = f"trf_blocks.{block[1]}." if block else ""
        if stem == "attn.c_attn":
            parts += [
                Part(f"{before}att.W_{name}.{leaf}", ours, third)
                for third, name in enumerate(("query", "key", "value"))
            ]
        else:
            leaf = {"weight": "scale", "bias": "shift"}[leaf] if stem.startswith("ln_") else leaf
            parts.append(Part(f"{before}{BOOK[stem]}.{leaf}", ours))
    return parts


def measure(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of such a model, by our name; takes no memory."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT2(config).named_parameters()}


def export_model(saved: Checkpoint, to: str, out: Path) -> list[str]:
    """Write the model of `saved` as a file of kind `to`: `out` is a folder for "hf", else a file.

    It is there as a whole or not at all. Returns notes on what the other side computes differently.
    Raises WorkloadError when `out` exists, when the weights are not those of the configuration, and for an untied head
    in a kind that has none.
    """
    refuse_existing(out)
    model, tokenizer = saved.config.model, saved.config.data.tokenizer
    compare(
        measure(model), {name: tuple(t.shape) for name, t in saved.model.items()}, "the checkpoint's weights"
    )
    if to == "nanogpt" and not model.tied:
        raise WorkloadError(
            "nanoGPT has one matrix for token embedding and output head; this model has two",
            "--to hf and --to book hold both",
        )
    n_vocab = TOKENIZERS[tokenizer]
    ours = {
        name: t[:n_vocab] if name in ("wte.weight", "lm_head.weight") else t
        for name, t in saved.model.items()
    }
    cut = replace(model, vocab_size=n_vocab)
    theirs = {part.theirs: take(part, ours) for part in plan_parts(cut, to)}
    with stage(out) as staging:
        {"hf": _write_hf, "nanogpt": _write_nanogpt, "book": _write_book}[to](staging, theirs, cut, saved)
    notes = []
    if (to == "nanogpt" and model.gelu_tanh) or (to == "book" and not model.gelu_tanh):
        other, mine = ("exact", "tanh") if model.gelu_tanh else ("tanh", "exact")
        notes.append(
            f"its code computes the {other} GELU, this model the {mine} one: each differs by up to 0.0005"
        )
    if to != "book" and not model.qkv_bias:
        notes.append("query, key and value have no bias here; in the file they have one of zeros")
    return notes


def take(part: Part, ours: Mapping[str, Tensor]) -> Tensor:
    """The tensor as the foreign file has it, with memory of its own."""
    tensor = ours[part.ours] if part.third is None else ours[part.ours].chunk(3)[part.third]
    return (tensor.T if part.transposed else tensor).clone(memory_format=torch.contiguous_format)


def _write_hf(folder: Path, theirs: dict[str, Tensor], model: ModelConfig, saved: Checkpoint) -> None:
    tensors = {name if name == "lm_head.weight" else f"transformer.{name}": t for name, t in theirs.items()}
    _fill_qkv_bias(tensors, model)
    eot = model.vocab_size - 1
    document: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_embd": model.n_embd,
        "n_positions": model.n_ctx,
        "n_ctx": model.n_ctx,
        "vocab_size": model.vocab_size,
        "activation_function": "gelu_new" if model.gelu_tanh else "gelu",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": model.init_std,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
        "tie_word_embeddings": model.tied,
        "bos_token_id": eot,
        "eos_token_id": eot,
    }
    if not model.qkv_bias:
        document["qkv_bias"] = False  # read by `import` alone, which then leaves out the zeros
    folder.mkdir()
    _write_json(folder / "config.json", document)
    _write_json(folder / "generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if saved.config.data.tokenizer == "gpt2":
        merges = load_merges()
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
        _write_json(folder / "vocab.json", _name_tokens(merges))
        tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": model.n_ctx}
        _write_json(folder / "tokenizer_config.json", tokenizer)


def _write_nanogpt(file: Path, theirs: dict[str, Tensor], model: ModelConfig, saved: Checkpoint) -> None:
    tensors = {f"transformer.{name}": tensor for name, tensor in theirs.items()}
    _fill_qkv_bias(tensors, model)
    # An optimizer without moments, which its train.py loads before it goes on: two groups, of matrices and of the rest.
    train, matrices = saved.config.train, [t for t in tensors.values() if t.dim() >= 2]
    rest = [t for t in tensors.values() if t.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": train.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
    )
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]  # one storage under two names: stored once
    best = saved.state.best_val_loss
    content = {
        "model": tensors,
        "optimizer": optimizer.state_dict(),
        "model_args": {
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "n_embd": model.n_embd,
            "block_size": model.n_ctx,
            "bias": True,
            "vocab_size": model.vocab_size,
            "dropout": model.dropout,
        },
        "iter_num": saved.state.step,
        "best_val_loss": 1e9 if best is None else best,  # 1e9 is what nanoGPT begins with
        # Its GPTConfig refuses keys that it does not know, so what only we know is here.
        "config": {"qkv_bias": model.qkv_bias, "gelu_tanh": model.gelu_tanh, "init_std": model.init_std},
    }
    torch.save(content, file)


def _write_book(file: Path, theirs: dict[str, Tensor], model: ModelConfig, saved: Checkpoint) -> None:
    tensors = dict(theirs)
    # GPTModel has a head of its own and a mask in each block, and load_state_dict asks for both.
    if model.tied:
        tensors["out_head.weight"] = tensors["tok_emb.weight"].clone()
    for layer in range(model.n_layer):
        mask = torch.ones(model.n_ctx, model.n_ctx, dtype=torch.bool).triu(1)
        tensors[f"trf_blocks.{layer}.att.mask"] = mask
    about = {
        "vocab_size": model.vocab_size,
        "context_length": model.n_ctx,
        "emb_dim": model.n_embd,
        "n_heads": model.n_head,
        "n_layers": model.n_layer,
        "drop_rate": model.dropout,
        "qkv_bias": model.qkv_bias,
        "tied": model.tied,
        "gelu_tanh": model.gelu_tanh,
        "init_std": model.init_std,
    }
    save_file(tensors, file, metadata={"format": "pt", "config": json.dumps(about)})


def _fill_qkv_bias(tensors: dict[str, Tensor], model: ModelConfig) -> None:
    """Zeros, where the other side always has a bias."""
    for layer in range(0 if model.qkv_bias else model.n_layer):
        tensors[f"transformer.h.{layer}.attn.c_attn.bias"] = torch.zeros(3 * model.n_embd)


def _name_tokens(merges: str) -> dict[str, int]:
    """vocab.bpe → GPT-2's vocab.json: every token as that file writes it, and its number (see parse_merges)."""
    printing = 188  # bytes that are written as themselves; they have the first numbers
    single = sorted((rank, token[0]) for token, rank in parse_merges(merges).items() if len(token) == 1)
    names = [chr(byte) if rank < printing else chr(256 + rank - printing) for rank, byte in single]
    names += [line.replace(" ", "") for line in merges.splitlines()[1:]]
    return {name: number for number, name in enumerate([*names, "<|endoftext|>"])}


def import_model(
    path: Path, out: Path, *, heads: int = 0, tokenizer: str = "", settings: Sequence[str] = ()
) -> Imported:
    """Make the run `out`, at step 0, of the weights in `path`: a file or a folder of any of the kinds.

    heads: attention heads, for files that do not say (0: 64 channels each, as in every GPT-2). tokenizer: "gpt2" or
    "bytes" ("": by the size of the vocabulary). settings: ``key=value``, on top of the defaults of config.py.
    The run is there as a whole or not at all. Raises WorkloadError for whatever is not a GPT-2 in full.
    """
    refuse_existing(out)
    notes: list[str] = []
    source = _untie(read(path), notes)
    model = _guess_model(source, heads, notes)
    tokenizer = tokenizer or _guess_tokenizer(model.vocab_size, path)
    config = Config(model, DataConfig(tokenizer=tokenizer), TrainConfig())
    config = parse_config(render_toml(config), settings, where=str(source.path))
    weights = convert(source, config.model)
    tokenizer = config.data.tokenizer
    if padding := config.model.vocab_size - TOKENIZERS[tokenizer]:
        notes.append(
            f"the last {padding} rows of the vocabulary are no tokens of {tokenizer}: taken as padding"
        )
    state = State(
        step=0, steps=config.train.steps, sequences=0, best_val_loss=None, elapsed_s=0.0, metrics_bytes=0
    )
    random = {"cpu": torch.Generator().manual_seed(config.train.seed).get_state()}
    with stage(out) as staging:
        checkpoint.save(staging / "checkpoints", config, state, model=weights, optimizer={}, random=random)
        save_config(staging, config)
    return Imported(source.kind, config, notes)


def _untie(source: Source, notes: list[str]) -> Source:
    """Without the head's second copy of the embedding; says whether the model is tied."""
    head, embedding = (
        ("out_head.weight", "tok_emb.weight") if source.kind == "book" else ("lm_head.weight", "wte.weight")
    )
    tensors = dict(source.tensors)
    tied = source.said.get("tied", head not in tensors)
    if head in tensors and embedding in tensors and source.said.get("tied", True):
        one, other = tensors[head], tensors[embedding]
        tied = one.dtype == other.dtype and torch.equal(one, other)
        if not tied and source.said.get("tied"):
            notes.append(f"{head} is not {embedding}, though the file says tied: kept as two")
    if tied:
        tensors.pop(head, None)
    return replace(source, tensors=tensors, said={**source.said, "tied": tied})


def _guess_model(source: Source, heads: int, notes: list[str]) -> ModelConfig:
    """What the file says of its model; where it says nothing, what its shapes say."""
    book = source.kind == "book"
    tensors, said = source.tensors, dict(source.said)
    tables = []
    for name in ("tok_emb.weight", "pos_emb.weight") if book else ("wte.weight", "wpe.weight"):
        if name not in tensors or tensors[name].dim() != 2:
            shape = tuple(tensors[name].shape) if name in tensors else "missing"
            raise WorkloadError(f"{source.path}: {name} is {shape}; expected (rows, channels)", FETCH_HINT)
        tables.append(tensors[name].shape)
    matches = (re.match(r"(?:h|trf_blocks)\.(\d+)\.", name) for name in tensors)
    blocks = [int(match[1]) for match in matches if match]
    if len(set(blocks)) != max(blocks) + 1:
        raise WorkloadError(
            f"{source.path}: {len(set(blocks))} blocks, but one has the number {max(blocks)}: some are missing",
            FETCH_HINT,
        )
    seen: dict[str, Any] = {
        "n_layer": len(set(blocks)),
        "n_embd": tables[0][1],
        "vocab_size": tables[0][0],
        "n_ctx": tables[1][0],
    }
    differ = [
        f"{source.path}: {name} is {said[name]} by its own word, {value} by its tensors"
        for name, value in seen.items()
        if said.get(name, value) != value
    ]
    if differ:
        raise WorkloadError("\n".join(differ), f"a part of it is missing or of another model: {FETCH_HINT}")
    seen["dropout"] = 0.0
    seen["qkv_bias"] = any(name.endswith(("c_attn.bias", "W_query.bias")) for name in tensors)
    if heads and said.get("n_head", heads) != heads:
        raise WorkloadError(
            f"{source.path}: {said['n_head']} heads by its own word, not {heads}", "leave out --heads"
        )
    if heads:
        said["n_head"] = heads
    said = {**seen, **said}
    if "n_head" not in said:
        if said["n_embd"] % HEAD_CHANNELS:
            raise WorkloadError(
                f"{source.path}: it does not say how many attention heads there are, and {said['n_embd']} channels are "
                f"not {HEAD_CHANNELS} each as in GPT-2's sizes",
                "say it with --heads N",
            )
        said["n_head"] = said["n_embd"] // HEAD_CHANNELS
        notes.append(
            f"{said['n_head']} heads are assumed, {HEAD_CHANNELS} channels each as in GPT-2's sizes; --heads N says otherwise"
        )
    if "gelu_tanh" not in said and not book:
        notes.append("the tanh GELU is assumed; --set gelu_tanh=false takes the exact one")
    return ModelConfig(**said)


def _guess_tokenizer(vocab_size: int, path: Path) -> str:
    """gpt2 where its tokens fit, bytes where exactly they do."""
    if vocab_size >= TOKENIZERS["gpt2"]:
        return "gpt2"
    if vocab_size == TOKENIZERS["bytes"]:
        return "bytes"
    sizes = " and ".join(f"{name}'s {size}" for name, size in TOKENIZERS.items())
    raise WorkloadError(
        f"{path}: a vocabulary of {vocab_size}, which is none of the tokenizers here: {sizes}",
        "--tokenizer bytes if its first 257 tokens are bytes; a model of characters has its alphabet elsewhere, "
        "and cannot be read",
    )


def convert(source: Source, config: ModelConfig) -> dict[str, Tensor]:
    """Weights by our names, fp32, each checked: all there, no others, of the right shape, finite."""
    shapes = measure(config)
    tensors = dict(source.tensors)
    parts = plan_parts(config, source.kind)
    expected = {part.theirs: _shape(part, shapes[part.ours]) for part in parts}
    if not any(name.endswith((".bias", ".shift")) for name in tensors):
        # nanoGPT without any bias, layer norms included: the same function with zeros.
        tensors |= {
            name: torch.zeros(shape) for name, shape in expected.items() if name.endswith((".bias", ".shift"))
        }
    if not config.qkv_bias:
        for name in [name for name in tensors if name.endswith("attn.c_attn.bias")]:
            if not tensors[name].any():
                del tensors[name]  # zeros that stand for none
    compare(expected, {name: tuple(t.shape) for name, t in tensors.items()}, str(source.path))
    gathered: dict[str, list[Tensor]] = {}
    for part in parts:
        tensor = tensors[part.theirs]
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise WorkloadError(
                f"{source.path}: {part.theirs} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; "
                "weights are plain fractions",
                FETCH_HINT,
            )
        tensor = tensor.to(torch.float32)
        if not torch.isfinite(tensor).all():
            raise WorkloadError(
                f"{source.path}: {part.theirs} has numbers that are not finite",
                "that model is broken; take an earlier checkpoint of it",
            )
        gathered.setdefault(part.ours, []).append(tensor.T if part.transposed else tensor)
    return {name: torch.cat(list_) if len(list_) > 1 else list_[0] for name, list_ in gathered.items()}


def _shape(part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = shape if part.third is None else (shape[0] // 3, *shape[1:])
    return shape[::-1] if part.transposed else shape


def compare(expected: Mapping[str, tuple[int, ...]], seen: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise one WorkloadError with all that is missing, not expected, or of another shape."""
    wrong = [
        f"{name} is {seen[name]}, expected {expected[name]}"
        for name in expected
        if name in seen and seen[name] != expected[name]
    ]
    complaints = (
        ("missing", [name for name in expected if name not in seen]),
        ("not known in such a model", [name for name in seen if name not in expected]),
        ("of another shape", wrong),
    )
    lines = [f"{where}: {len(names)} {what}: {_some(names)}" for what, names in complaints if names]
    if lines:
        raise WorkloadError("\n".join(lines), f"not a whole GPT-2 of that size: {FETCH_HINT}")


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def refuse_existing(out: Path) -> None:
    """Raise WorkloadError when `out` is there: before minutes of reading, not after."""
    if out.exists():
        raise WorkloadError(f"{out} exists", "name another --out, or remove it first")


@contextmanager
def stage(out: Path) -> Iterator[Path]:
    """A path beside `out` to make a file or folder at; it becomes `out` when all of it is on the disk, or goes.

    Raises WorkloadError when `out` exists, and when writing fails.
    """
    refuse_existing(out)
    staging = out.parent / f".{out.name}.partial"
    umask = os.umask(0o077)
    os.umask(umask)
    mode = 0o666 & ~umask  # as any file; safetensors makes its files for their owner alone
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(staging)  # of a crash
        yield staging
        for path in (*staging.rglob("*"), staging):
            if path.is_file():
                path.chmod(mode)
            sync(path)
        staging.rename(out)
        sync(out.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
        raise WorkloadError(
            f"{out} could not be written: {error}", "nothing of it is left; make room, or name another --out"
        ) from error
    finally:
        _remove(staging)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _write_json(file: Path, document: object) -> None:
    file.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")


def render_imported(imported: Imported, source: Path, out: Path) -> Iterable[str]:
    """What was made, for a person."""
    model = imported.config.model
    count = sum(torch.Size(shape).numel() for shape in measure(model).values())
    yield (
        f"model    {imported.kind} from {source}: {count:,} parameters, {model.n_layer} layers, {model.n_head} heads, "
        f"{model.n_embd} channels, {model.n_ctx} tokens of context, {imported.config.data.tokenizer} tokens"
    )
    for note in imported.notes:
        yield f"note     {note}"
    yield f"use      python -m workload sample {out}"
    data = imported.config.data.source
    yield f"train    python -m workload train --resume --out {out}    (on {data}; import with --set source=… for other data)"
