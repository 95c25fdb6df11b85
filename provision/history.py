"""What `verify` saw, kept on this computer: checkpoints/NAME/verify/TIME.json, and what it tells about the next time."""

import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from provision.checks import Check, Outcome
from provision.fetch import sync

FORMAT = 1
COMPARED = 10  # earlier records at most
LEAST_COMPARED = 3
# What is compared, and the part of the median below which it is told as a fault. A disk's speed depends on what its
# cache holds; a processor's on whatever else is at work, so it is not compared.
SLOWER = {r"card\d+_(tokens_per_s|load_tflops)": 0.85, r"disk_(read|write)_mb_per_s": 0.5}
AS_BEFORE = "as fast as before"
REMEDY_SLOWER = (
    "Something changed: other programs at work (then verify again), heat, a power limit, a driver or kernel of late "
    "(the page says when)."
)


@dataclass(frozen=True)
class Entry:
    """A check and what came of it."""

    name: str
    good: bool
    seen: str
    remedy: str  # "" where it was good
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Record:
    """One verification. `left_out`: why the long checks were not run, "" where they were."""

    machine: str
    began: datetime  # with its time zone
    seconds: float
    left_out: str
    about: Mapping[str, str]  # the machine in words: kernel, processor, cards
    entries: tuple[Entry, ...]

    @property
    def good(self) -> bool:
        return all(entry.good for entry in self.entries)

    @property
    def figures(self) -> dict[str, float]:
        return {name: value for entry in self.entries for name, value in entry.figures.items()}


def entry_of(outcome: Outcome) -> Entry:
    remedy = "" if outcome.good else outcome.check.remedy
    return Entry(outcome.check.name, outcome.good, outcome.seen, remedy, dict(outcome.figures))


def render_record(record: Record) -> str:
    """As JSON."""
    fields = {**asdict(record), "began": record.began.astimezone(UTC).isoformat(timespec="seconds")}
    return json.dumps({"format": FORMAT, "good": record.good, **fields}, indent=1, ensure_ascii=False) + "\n"


def parse_record(text: str) -> Record:
    """Raises ValueError where it is none of ours."""
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}; this version reads {FORMAT}")
        entries = tuple(
            Entry(
                str(entry["name"]),
                entry["good"] is True,
                str(entry["seen"]),
                str(entry["remedy"]),
                {str(name): float(value) for name, value in entry["figures"].items()},
            )
            for entry in found["entries"]
        )
        return Record(
            machine=str(found["machine"]),
            began=datetime.fromisoformat(found["began"]).astimezone(UTC),
            seconds=float(found["seconds"]),
            left_out=str(found["left_out"]),
            about={str(name): str(value) for name, value in found["about"].items()},
            entries=entries,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it cannot be read ({error!r})") from error


def save_text(path: Path, text: str) -> None:
    """Whole, or not at all: an older file of that name stays until this one is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.partial")
    staged.write_text(text, encoding="utf-8")
    sync(staged)
    os.replace(staged, path)


def save_record(folder: Path, record: Record) -> Path:
    path = folder / f"{record.began.astimezone(UTC):%Y%m%d-%H%M%S}.json"
    save_text(path, render_record(record))
    return path


def load_records(folder: Path) -> tuple[list[Record], list[str]]:
    """All there are, oldest first; and what cannot be read, in words."""
    records, refused = list[Record](), list[str]()
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(parse_record(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            refused.append(f"{path}: {error}")
    return sorted(records, key=lambda record: record.began), refused


def compare(
    outcomes: Sequence[Outcome], about: Mapping[str, str], earlier: Sequence[Record]
) -> Outcome | None:
    """Whether what was measured is as fast as it used to be on the same hardware; None where too little is known."""
    now = {name: value for outcome in outcomes for name, value in outcome.figures.items()}
    alike = [record for record in earlier if hardware(record.about) == hardware(about)]
    slow, known = list[str](), 0
    for name, value in now.items():
        part = next((part for pattern, part in SLOWER.items() if re.fullmatch(pattern, name)), None)
        before = [record.figures[name] for record in alike if name in record.figures][-COMPARED:]
        if part is None or len(before) < LEAST_COMPARED:
            continue
        known += 1
        usual = statistics.median(before)
        if value < part * usual:
            slow.append(f"{name} is {value:.4g}, and used to be {usual:.4g};")
    if not known:
        return None
    return Outcome(
        Check(AS_BEFORE, "", REMEDY_SLOWER), not slow, " ".join(slow) or f"{known} figures are what they were"
    )


def hardware(about: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(about.get(name, "") for name in ("processor", "cards"))
