"""Where to cut, as values: no machine is needed to plan it."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

Stage = Literal["live", "installed"]
Kind = Literal["power", "connection", "process", "stop"]

STAGES: tuple[Stage, ...] = get_args(Stage)
KINDS: tuple[Kind, ...] = ("connection", "process", "power")

LONG_S = 5.0  # a Step that takes longer is cut at several places
PLACES = 4
SHORT_DELAY_S = 0.02  # within the shortest Steps, which take some 50 ms in an emulated machine

# How long the connection is away, in turn. Most are short, as a run with fifty of them is to end some day;
# `swallow` is a black hole: nothing is closed, and nothing comes through.
DROPS: tuple[tuple[str, float], ...] = (
    ("cut", 1), ("cut", 3), ("cut", 0), ("cut", 8), ("swallow", 30), ("cut", 1), ("cut", 2), ("cut", 50),
)  # fmt: skip


# Beginnings of lines that `fab` prints between the Steps and the reboot, and after the last Step: cut there too.
MOMENTS: dict[Kind, tuple[tuple[Stage, str], ...]] = {
    "process": (("live", "Probed again"), ("live", "Rebooting."), ("installed", "Probed again")),
    "power": (("live", "Probed again"), ("installed", "Probed again")),
}


@dataclass(frozen=True)
class Cut:
    """`after_s` after Step `step` of `stage` has begun, or where `fab` prints `line`. `stop` is no fault: the run ends there."""

    stage: Stage
    step: str
    kind: Kind
    after_s: float = 0.0
    drop: str = "cut"  # of a connection: cut, swallow
    drop_s: float = 1.0
    line: str = ""

    @property
    def aim(self) -> str:
        return self.step or f"after: {self.line}"


@dataclass(frozen=True)
class Hit:
    """A cut that was made, and the Step that was at work then: "" where none was."""

    cut: Cut
    during: str
    between: str = ""  # of two Steps, the one that had just ended

    @property
    def on_target(self) -> bool:
        return self.during == self.cut.aim


def plan_cuts(
    steps: Mapping[Stage, Mapping[str, float]],
    kind: Kind,
    seed: int,
    stages: Sequence[Stage] = STAGES,
    places: int = PLACES,
) -> list[Cut]:
    """A cut in every Step of the stages, in their order; `places` in a long one. The same seed gives the same cuts.

    `steps`: per stage, name → seconds that the Step took without a fault.
    """
    chance = random.Random(f"{seed} {kind}")
    found: list[Cut] = []
    for stage in stages:
        for name, seconds in steps[stage].items():
            for after_s in delays(seconds, chance, places):
                drop, drop_s = DROPS[len(found) % len(DROPS)]
                found.append(Cut(stage, name, kind, round(after_s, 3), drop, drop_s))
        found += [Cut(stage, "", kind, line=line) for at, line in MOMENTS.get(kind, ()) if at == stage]
    return found


def delays(seconds: float, chance: random.Random, places: int = PLACES) -> list[float]:
    """Seconds after the Step's begin, rising: `places` of them in a long one, one in a short one."""
    if seconds < LONG_S:
        return [chance.choice((0.0, 0.0, chance.uniform(0, SHORT_DELAY_S)))]
    share = 0.85 * seconds / places  # it may be quicker the next time
    return [place * share + chance.uniform(0.05, 0.8) * share for place in range(places)]


def sample_cuts(cuts: Sequence[Cut], count: int, seed: int) -> list[Cut]:
    """`count` of them by chance, in their order; all where there are no more. Every stage has a share."""
    if count >= len(cuts):
        return list(cuts)
    chance = random.Random(f"{seed} sample")
    stages = [stage for stage in STAGES if any(cut.stage == stage for cut in cuts)]
    groups = [[index for index, cut in enumerate(cuts) if cut.stage == stage] for stage in stages]
    chosen = {chance.choice(group) for group in groups[:count]}
    rest = [index for index in range(len(cuts)) if index not in chosen]
    chosen |= set(chance.sample(rest, count - len(chosen)))
    return [cuts[index] for index in sorted(chosen)]


def rotate(steps: Mapping[Stage, Sequence[str]], day: int) -> list[Cut]:
    """The few cuts of one day's tests: another day, other Steps. One Step is never cut twice.

    The power in one Step of each stage, `fab` at two, the connection at three of the live stage. Every second day the
    power goes while pacman works on the installed system, whose Step is the first of its stage.
    """
    chance = random.Random(f"day {day}")
    live = chance.sample(list(steps["live"]), 6)
    kinds: list[Kind] = ["power", "process", "process", "connection", "connection", "connection"]
    place = {name: index for index, name in enumerate(steps["live"])}
    found = [
        Cut("live", name, kind, 0.0, "cut", chance.choice((1, 3, 8)))
        for name, kind in zip(live, kinds, strict=True)
    ]
    found.sort(key=lambda cut: place[cut.step])
    packages, *others = steps["installed"]
    last = Cut("installed", packages, "power", round(chance.uniform(0, LONG_S), 3))
    if chance.random() < 0.5:
        last = Cut("installed", chance.choice(others), "power", chance.choice((0.0, 0.02)))
    return [*found, last]


def parse_marker(line: str) -> tuple[str, str]:
    """A `@@begin` or `@@end` line of an apply as (what, name or number): ("", "") where there was none yet."""
    word, _, rest = line.partition(" ")
    if word == "@@begin":
        return "begin", rest.partition(" ")[2]
    return (word.removeprefix("@@"), rest) if word in ("@@end", "@@failed") else ("", "")


def never_hit(cuts: Sequence[Cut], hits: Sequence[Hit]) -> list[tuple[Stage, str]]:
    """(stage, Step) that was to be cut and was at work at no cut."""
    hit = {(hit.cut.stage, hit.during) for hit in hits}
    wanted = dict.fromkeys((cut.stage, cut.aim) for cut in cuts if cut.kind != "stop")
    return [step for step in wanted if step not in hit]


def parse_kinds(text: str) -> list[Kind]:
    """`power,connection` as kinds, "" as none; ValueError names a wrong one."""
    return [cast(Kind, choice(word, KINDS)) for word in text.split(",") if word]


def parse_stages(text: str) -> list[Stage]:
    return [cast(Stage, choice(word, STAGES)) for word in text.split(",")]


def choice(word: str, known: Sequence[str]) -> str:
    if word not in known:
        raise ValueError(f"{word!r} is none of {', '.join(known)}")
    return word
