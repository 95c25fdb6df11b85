"""A model that trains in milliseconds, and text for it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from workload import checkpoint
from workload.config import Config, DataConfig, ModelConfig, TrainConfig

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=16, n_ctx=16, vocab_size=257)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny matrices gain nothing from more, and lose much on a busy machine


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    lines = (
        f"{a} times {b} is {a * b}, and {b} times {a} is {a * b} as well.\n"
        for a in range(12)
        for b in range(12)
    )
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def config(text: Path) -> Config:
    """Twelve steps of the tiny model with dropout, so that the generators' states matter."""
    return Config(
        model=ModelConfig(n_layer=2, n_head=2, n_embd=16, n_ctx=16, vocab_size=257, dropout=0.1),
        data=DataConfig(source=str(text), tokenizer="bytes", val_fraction=0.1),
        train=TrainConfig(
            steps=12,
            batch=4,
            micro_batch=2,
            lr=1e-2,
            warmup=2,
            log_every=1,
            eval_every=4,
            eval_sequences=4,
            save_every=4,
            sample_tokens=8,
            sample_prompt="1 times",
        ),
    )


def raise_at(monkeypatch: pytest.MonkeyPatch, nth: int, error: BaseException) -> Callable[[], int]:
    """Every operation on the file system that saving uses counts; the nth raises `error`. Returns the counter."""
    count = 0

    def wrap(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == nth:
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, names in {
        os: ("fsync",),
        shutil: ("rmtree",),
        Path: ("rename", "replace", "write_text", "mkdir", "unlink"),
        checkpoint: ("save_file",),
    }.items():
        for name in names:
            wrap(owner, name)
    return lambda: count
