"""What a run is: three frozen dataclasses, read from a preset and changed by ``--set key=value``.

`load_config` reports every error at once. `render_toml` writes what `parse_config` reads, so a run's
``config.toml`` and a checkpoint's are ordinary preset files.
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from workload.errors import WorkloadError

# Vocabulary of each tokenizer, end-of-text included (see tokenizer.py).
TOKENIZERS = {"gpt2": 50257, "bytes": 257}
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")


@dataclass(frozen=True)
class ModelConfig:
    """The network. Sizes are counts; the defaults are GPT-2 small's."""

    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block
    n_embd: int = 768  # channels C of a token's vector; n_head divides it
    n_ctx: int = 1024  # tokens T that the model can see at once
    vocab_size: int = 0  # rows of the token embedding; 0: as many as the tokenizer has
    dropout: float = 0.0  # probability
    tied: bool = True  # the output head is the token embedding
    qkv_bias: bool = True  # bias in the query, key and value projections
    gelu_tanh: bool = True  # GPT-2's tanh form of GELU; false: the exact one, as in nanoGPT
    init_std: float = 0.02  # deviation of initial weights; narrow models learn sooner from a larger one


@dataclass(frozen=True)
class DataConfig:
    """The tokens."""

    source: str = "demo"  # "demo", a folder made by `prepare`, or a text file or folder of them
    tokenizer: str = "gpt2"  # "gpt2" or "bytes"
    val_fraction: float = 0.1  # of each text's bytes, its end, kept for validation


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. A step is one update of the weights."""

    steps: int = 19073  # updates; 10e9 tokens at the defaults
    batch: int = 512  # sequences a step; times n_ctx: tokens a step
    micro_batch: int = 0  # sequences a forward pass; divides batch; 0: what is fastest and fits the memory
    optimizer: str = "adamw"  # "adamw", or "muon": Muon on the matrices of the blocks, AdamW on the rest
    lr: float = 6e-4  # peak learning rate of AdamW
    muon_lr: float = 0.02  # peak learning rate of Muon; follows the same schedule
    muon_momentum: float = 0.95  # decay of Muon's mean of gradients
    schedule: str = "cosine"  # after the warm-up: "cosine", or "wsd": lr stays until the cool-down
    decay: float = 0.2  # cool-down of wsd, as a fraction of steps
    lr_end: float = 0.1  # learning rate at the last step, as a fraction of lr
    warmup: int = 700  # steps from 0 to lr
    weight_decay: float = 0.1  # of matrices and embeddings, a step and unit of lr
    beta1: float = 0.9  # decay of the mean of gradients
    beta2: float = 0.95  # decay of the mean of squared gradients
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    guard: float = 6.0  # deviations above its mean from which a loss or gradient norm is left out; 0: never
    guard_window: int = 128  # updates that this mean is of
    max_seconds: float = 0.0  # wall time that bounds `steps`: fewer are planned on a slow machine; 0: none
    seed: int = 1  # of weights, dropout, order of data and samples
    log_every: int = 10  # steps between two progress lines
    eval_every: int = 250  # steps between two evaluations; each has a checkpoint
    eval_sequences: int = 160  # validation sequences looked at; 0: all
    save_every: int = 250  # steps between two checkpoints
    keep: int = 2  # newest checkpoints kept, besides the best
    keep_every: int = 0  # steps; checkpoints at its multiples are kept for good; 0: none
    sample_tokens: int = 200  # length of the sample after each evaluation; 0: no samples
    sample_prompt: str = "\n"  # text that samples go on from


@dataclass(frozen=True)
class Config:
    """All of a run that is decided beforehand, except device and folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


SECTIONS: dict[str, type[ModelConfig] | type[DataConfig] | type[TrainConfig]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
}
KEYS = [f"{section}.{item.name}" for section, kind in SECTIONS.items() for item in dataclasses.fields(kind)]
Table = Mapping[str, Mapping[str, Any]]


def list_presets() -> list[str]:
    folder = resources.files("workload") / "presets"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_config(preset: str, settings: Sequence[str] = ()) -> Config:
    """The preset with ``key=value`` settings on top. Raises one WorkloadError naming everything wrong."""
    known = list_presets()
    if preset not in known:
        raise WorkloadError(
            f'there is no preset "{preset}"{_suggest(preset, known)}', f"presets: {', '.join(known)}"
        )
    text = (resources.files("workload") / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
    return parse_config(text, settings, where=f"preset {preset}")


def parse_config(text: str, settings: Sequence[str] = (), *, where: str) -> Config:
    """TOML with the tables model, data and train, then settings. `where` names the text in errors."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise WorkloadError(f"{where}: not TOML: {error}") from error
    errors: list[str] = []
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, table in document.items():
        if section not in SECTIONS or not isinstance(table, dict):
            errors.append(f"{where}: {section} is not a table of a run{_suggest(section, list(SECTIONS))}")
            continue
        for name, value in table.items():
            _put(values, f"{section}.{name}", value, where, errors)
    for setting in settings:
        key, equals, word = setting.partition("=")
        if not equals:
            errors.append(f"--set {setting}: expected key=value")
        else:
            _put(values, key.strip(), word.strip(), f"--set {setting}", errors, word=True)
    config = None if errors else _build(values)
    if config is not None:
        errors = check(config)
    if errors or config is None:
        raise WorkloadError(
            "\n".join(errors), "every key, its unit and default: python -m workload train --help"
        )
    return config


def _put(
    values: dict[str, dict[str, Any]],
    key: str,
    value: object,
    where: str,
    errors: list[str],
    *,
    word: bool = False,
) -> None:
    """Set one value, or say why not. A `word` comes from a command line, where all is text."""
    if "." not in key:
        homes = [full for full in KEYS if full.endswith(f".{key}")]
        key = homes[0] if homes else key
    if key not in KEYS:
        errors.append(f"{where}: there is no key {key}{_suggest(key, KEYS)}")
        return
    section, name = key.split(".")
    kind = next(item.type for item in dataclasses.fields(SECTIONS[section]) if item.name == name)
    assert isinstance(kind, type)
    seen = _from_word(value, kind) if word and isinstance(value, str) else value
    if kind is float and type(seen) is int:
        seen = float(seen)
    if type(seen) is not kind:
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
        errors.append(f"{where}: {key} must be {expected}, not {value!r}")
    else:
        values[section][name] = seen


def _from_word(word: str, kind: type) -> object:
    """A word of the command line as TOML would read it; text needs no quotes there."""
    if kind is str and not (len(word) > 1 and word[0] == word[-1] == '"'):
        return word
    try:
        return tomllib.loads(f"value = {word}")["value"]
    except tomllib.TOMLDecodeError:
        return word


def _build(values: Table) -> Config:
    """From well-typed values; a vocabulary of 0 becomes the tokenizer's."""
    data = DataConfig(**values["data"])
    model = ModelConfig(**values["model"])
    if model.vocab_size == 0:
        model = dataclasses.replace(model, vocab_size=TOKENIZERS.get(data.tokenizer, 0))
    return Config(model=model, data=data, train=TrainConfig(**values["train"]))


def check(config: Config) -> list[str]:
    """Every reason why the numbers make no sense, alone or together; empty when they do."""
    model, data, train = config.model, config.data, config.train
    errors: list[str] = []

    def rule(holds: bool, complaint: str) -> None:
        if not holds:
            errors.append(complaint)

    above_zero = {
        "model": ("n_layer", "n_head", "n_embd", "n_ctx", "init_std"),
        "train": (
            *("steps", "batch", "lr", "muon_lr", "guard_window"),
            *("log_every", "eval_every", "save_every", "keep"),
        ),
    }
    train_not_below = (
        "micro_batch warmup weight_decay clip guard max_seconds seed eval_sequences keep_every sample_tokens"
    )
    for section, names in above_zero.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            rule(0 < value < math.inf, f"{section}.{name} must be more than 0, not {value}")
    for name in train_not_below.split():
        value = getattr(train, name)
        rule(0 <= value < math.inf, f"train.{name} must not be less than 0, not {value}")
    for name in ("beta1", "beta2", "muon_momentum"):
        rule(0 <= getattr(train, name) < 1, f"train.{name} must be in [0, 1), not {getattr(train, name)}")
    rule(0 <= model.dropout < 1, f"model.dropout must be in [0, 1), not {model.dropout}")
    rule(
        0 <= train.lr_end <= 1,
        f"train.lr_end is a fraction of train.lr and must be in [0, 1], not {train.lr_end}",
    )
    rule(
        0 < train.decay <= 1,
        f"train.decay is a fraction of train.steps and must be in (0, 1], not {train.decay}",
    )
    for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        word = getattr(train, name)
        rule(word in known, f"train.{name} must be {' or '.join(known)}, not {word}{_suggest(word, known)}")
    rule(0 < data.val_fraction < 1, f"data.val_fraction must be between 0 and 1, not {data.val_fraction}")
    rule(
        model.n_head < 1 or model.n_embd % model.n_head == 0,
        f"model.n_embd = {model.n_embd} is not a multiple of model.n_head = {model.n_head}",
    )
    rule(
        train.micro_batch < 1 or train.batch % train.micro_batch == 0,
        f"train.batch = {train.batch} is not a multiple of train.micro_batch = {train.micro_batch}",
    )
    if data.tokenizer not in TOKENIZERS:
        errors.append(f"data.tokenizer must be {' or '.join(TOKENIZERS)}, not {data.tokenizer}")
    elif not TOKENIZERS[data.tokenizer] <= model.vocab_size <= 65536:  # a token on disk is a uint16
        size = TOKENIZERS[data.tokenizer]
        errors.append(
            f"model.vocab_size = {model.vocab_size} does not fit the {size} tokens of {data.tokenizer}; 0 fits"
        )
    return errors


def render_toml(config: Config) -> str:
    """`config` as TOML, every key written out."""
    lines: list[str] = []
    for section in SECTIONS:
        lines.append(f"[{section}]")
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            lines.append(f"{name} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
        return f'"{escaped}"'
    return repr(value)


def _suggest(word: str, known: Sequence[str]) -> str:
    """``; did you mean X?`` for the closest known word, compared also without its section."""
    names = {full.rpartition(".")[2]: full for full in known}
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:
        close = [names[name] for name in difflib.get_close_matches(word.rpartition(".")[2], list(names), n=1)]
    return f"; did you mean {close[0]}?" if close else ""
