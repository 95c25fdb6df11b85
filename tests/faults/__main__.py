"""Every cut in every Step: hours. `make faults`, or a part of it:

    python -m tests.faults [--kinds connection,process,power] [--stages live,installed] [--places N] [--only STEPS] [--sample K] [--minutes M] [--seed S]

First one installation without a fault, for its Steps and for what came of it. Then one for each kind, cut again and
again on its way. `--go-on` keeps the installations that an earlier call finished. Exit 1 where a machine was not
installed, differs from the undisturbed one, or where its password can be read anywhere.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from provision.errors import ProvisionError
from provision.rehearsal import tools
from provision.rehearsal.bed import DEFAULT_CACHE, Bed
from tests.faults.compare import Difference, differences
from tests.faults.cuts import (
    KINDS,
    PLACES,
    STAGES,
    Cut,
    Hit,
    Kind,
    Stage,
    parse_kinds,
    parse_stages,
    plan_cuts,
    sample_cuts,
)
from tests.faults.install import Install, Outcome
from tests.faults.leaks import find_leaks
from tests.faults.report import render

REFERENCE = "reference"


@dataclass
class Record:
    """An installation as it is kept: what was planned, what became of it."""

    cuts: list[Cut]
    outcome: Outcome
    error: str = ""
    different: list[Difference] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    folder = arguments.cache.resolve() / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.go_on:
        for name in (REFERENCE, *KINDS):
            (folder / f"{name}.json").unlink(missing_ok=True)
    try:
        tools.install_missing(folder / "setup.log")
        with Bed(arguments.cache, on_build=lambda name: print(f"building {name}", flush=True)) as bed:
            reference = load(folder, REFERENCE) or install(bed, folder, REFERENCE, [], None)
            steps: dict[Stage, dict[str, float]] = reference.outcome.steps
            for kind in arguments.kinds:
                cuts = plan_cuts(steps, kind, arguments.seed, arguments.stages, arguments.places)
                cuts = [cut for cut in cuts if arguments.only.search(f"{cut.stage}: {cut.step}")]
                if arguments.sample:
                    cuts = sample_cuts(cuts, arguments.sample, arguments.seed)
                load(folder, kind) or install(bed, folder, kind, cuts, reference, arguments.minutes)
    except ProvisionError as error:
        print(f"error: {error}")
        return 1
    records = {name: record for name in (REFERENCE, *KINDS) if (record := load(folder, name))}
    for name, record in records.items():
        if (
            name != REFERENCE and not record.error
        ):  # by what is left out now, whatever was when it was installed
            record.different = differences(records[REFERENCE].outcome.state, record.outcome.state)
    text = render(records, f"--seed {arguments.seed}")
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    return int(any(record.error or record.different or record.outcome.leaks for record in records.values()))


def install(
    bed: Bed,
    folder: Path,
    name: str,
    cuts: Sequence[Cut],
    reference: Record | None,
    minutes: float = math.inf,
) -> Record:
    """One machine, to its end; what came of it is kept. Without a reference a failure is raised."""
    print(f"{name}: {len(cuts)} cuts", flush=True)
    vm = bed.machine(f"faults-{name}")
    secret = f"open-sesame-{time.time_ns():x}"
    at_work = Install(bed, vm, cuts, secret, lambda text: print(text, flush=True), cutting_s=60 * minutes)
    record = Record(list(cuts), at_work.outcome)
    try:
        with at_work.machine():
            at_work.until_done()
            at_work.collect()
            at_work.outcome.leaks = find_leaks(at_work)
    except ProvisionError as error:
        if reference is None:
            raise
        record.error = str(error)
        print(f"  failed: {error}", flush=True)
    else:
        for disk in vm.disk_paths():
            disk.unlink(missing_ok=True)  # gigabytes; the logs stay
    if reference and not record.error:
        record.different = differences(reference.outcome.state, at_work.outcome.state)
        for difference in record.different:
            print(f"  different: {difference}", flush=True)
    for leak in at_work.outcome.leaks:
        print(f"  the password can be read: {leak}", flush=True)
    partial = folder / f"{name}.json.partial"
    partial.write_text(json.dumps(asdict(record), indent=1))
    partial.rename(folder / f"{name}.json")
    return record


def load(folder: Path, name: str) -> Record | None:
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    kept: dict[str, Any] = json.loads(path.read_text())
    outcome = Outcome(**kept["outcome"])
    outcome.hits = [Hit(Cut(**hit.pop("cut")), **hit) for hit in kept["outcome"]["hits"]]
    return Record(
        [Cut(**cut) for cut in kept["cuts"]],
        outcome,
        kept["error"],
        [Difference(**difference) for difference in kept["different"]],
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds: list[Kind] = list(KINDS)
    parser.add_argument(
        "--kinds", type=parse_kinds, default=kinds, help=f"of {', '.join(KINDS)}; '' for none"
    )
    parser.add_argument("--stages", type=parse_stages, default=list(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--places", type=int, default=PLACES, help=f"cuts in a long Step (default {PLACES})")
    parser.add_argument("--only", type=re.compile, default="", help="a regular expression of `STAGE: STEP`")
    parser.add_argument("--sample", type=int, default=0, help="so many cuts of each kind, by chance; 0: all")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="of cutting, each kind; then it goes on to its end"
    )
    parser.add_argument("--seed", type=int, default=1, help="for the places within the Steps, and the sample")
    parser.add_argument("--go-on", action="store_true", help="keep what an earlier call finished")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where parts and machines are kept")
    parser.add_argument("--out", type=Path, help="file for the report, such as tests/faults/RESULTS.md")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
