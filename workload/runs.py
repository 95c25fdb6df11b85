"""Folders of runs: where a new one goes, and what configuration one that exists goes on with."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from workload.config import Config, load_config, parse_config, render_toml
from workload.errors import WorkloadError
from workload.files import replace_text

CONFIG = "config.toml"


def name_run(root: Path, preset: str, now: datetime) -> Path:
    """A folder below `root` that does not exist: PRESET-DATE-TIME."""
    stem = f"{preset}-{now:%Y%m%d-%H%M%S}"
    names = (stem if i == 0 else f"{stem}-{i + 1}" for i in range(1000))
    return next(root / name for name in names if not (root / name).exists())


def find_newest(root: Path) -> Path:
    """The run below `root` whose configuration was written last."""
    runs = sorted(root.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise WorkloadError(
            f"there is no run below {root} to resume", "name one with --out, or leave out --resume"
        )
    return runs[-1].parent


def resolve_config(out: Path, preset: str | None, settings: Sequence[str]) -> Config:
    """The preset (demo when none is named) with settings; for a folder that has a run, that run's with settings.

    Raises WorkloadError when what a run's weights or data depend on would change.
    """
    stored = out / CONFIG
    if not stored.exists():
        return load_config(preset or "demo", settings)
    was = parse_config(stored.read_text(encoding="utf-8"), where=str(stored))
    if preset is None:
        config = parse_config(stored.read_text(encoding="utf-8"), settings, where=str(stored))
    else:
        config = load_config(preset, settings)
    for section in ("model", "data"):
        if getattr(config, section) != getattr(was, section):
            raise WorkloadError(
                f"{out} was begun with another [{section}]: {getattr(was, section)}",
                f"go on with the same, or name another --out; asked for was {getattr(config, section)}",
            )
    if config.train.optimizer != was.train.optimizer:
        raise WorkloadError(
            f"{out} was begun with train.optimizer = {was.train.optimizer}, whose state {config.train.optimizer} "
            "cannot use",
            "go on with the same, or name another --out",
        )
    return config


def save_config(out: Path, config: Config) -> None:
    """Write the run's config.toml, at once or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / CONFIG, render_toml(config))
