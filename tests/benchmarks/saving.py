"""What saving costs a step: the same updates without saving, with it in the background, and with it in between.

    python -m tests.benchmarks.saving [--preset demo] [--rounds 7] [--every 90] [--set KEY=VALUE …]

Rounds of the three kinds take turns, each as many updates as lie between two checkpoints. "In the background" is what
training does (workload/writer.py); "in between" waits for the disk, as the next step would have to without it. The
round in the background pays for a whole checkpoint: its end waits for the disk only if updates were faster.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as `python -m workload` does
import torch

from tests.benchmarks.results import write_part
from workload import checkpoint
from workload.checkpoint import State
from workload.config import Config, load_config
from workload.device import choose_device, count_cores, describe, keep_memory
from workload.model import GPT2, count_parameters
from workload.optim import gather_state, make_optimizer
from workload.writer import Writer

TITLE = "# What saving costs a step"
KINDS = ("no saving", "in the background", "in between")


class Bench:
    def __init__(self, config: Config, device: torch.device, folder: Path) -> None:
        self.config, self.device = config, device
        self.writer = Writer(folder, keep=1, keep_every=0)
        torch.manual_seed(1)
        self.model = GPT2(config.model).to(device)
        self.optimizer = make_optimizer(self.model, config.train)
        size = (config.train.micro_batch or min(config.train.batch, 12), config.model.n_ctx + 1)
        self.ids = torch.randint(0, config.model.vocab_size, size, device=device)
        self.step = 0

    def update(self) -> None:
        self.model.loss(self.ids[:, :-1], self.ids[:, 1:]).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def save(self) -> None:
        state = State(
            step=self.step, steps=self.step, sequences=0, best_val_loss=None, elapsed_s=0.0, metrics_bytes=0
        )
        self.writer.save(
            self.config,
            state,
            model=self.model.state_dict(),
            optimizer=gather_state(self.optimizer, self.model),
            random=checkpoint.gather_random(self.device),
        )

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def round(self, kind: str, updates: int) -> tuple[float, float]:
        """Seconds of the updates with what saving they had, and of the save call alone."""
        self.writer.wait()
        self.finish()
        began_s = time.perf_counter()
        if kind != "no saving":
            self.save()
        called_s = time.perf_counter() - began_s
        if kind == "in between":
            self.writer.wait()
        for _ in range(updates):
            self.update()
        self.finish()
        return time.perf_counter() - began_s, called_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--every", type=int, default=90, help="updates between two checkpoints")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="on a CPU (default: the cores there are)")
    parser.add_argument("--root", type=Path, help="the disk to write to (default: that of temporary files)")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or count_cores())
    keep_memory()
    config = load_config(arguments.preset, arguments.set)
    device = choose_device(arguments.device)
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    calls: list[float] = []
    with tempfile.TemporaryDirectory(prefix="saving-", dir=arguments.root) as scratch:
        bench = Bench(config, device, Path(scratch))
        for _ in range(3):
            bench.update()
        bench.save()
        for _ in range(arguments.rounds):
            for kind in KINDS:
                seconds, called_s = bench.round(kind, arguments.every)
                took[kind].append(seconds)
                if kind == "in the background":
                    calls.append(called_s)
        bench.writer.wait()
        size = sum(path.stat().st_size for path in checkpoint.list_complete(Path(scratch))[-1].iterdir())
    lines = [
        TITLE,
        "",
        f"`python -m tests.benchmarks.saving --preset {arguments.preset} --every {arguments.every}`: "
        f"{count_parameters(bench.model):,} parameters, a checkpoint of {size / 1e6:,.0f} MB every {arguments.every} "
        f"updates, {arguments.rounds} rounds in turns; {describe(device, torch.float32)}. The call that begins to save "
        f"takes {1000 * statistics.median(calls):.0f} ms.",
        "",
        "| saving | ms an update | of the time without: median (least, most) |",
        "|---|---|---|",
    ]
    for kind in KINDS:
        ratios = sorted(s / base for s, base in zip(took[kind], took[KINDS[0]], strict=True))
        middle = 1000 * statistics.median(took[kind]) / arguments.every
        lines.append(
            f"| {kind} | {middle:.1f} | {statistics.median(ratios):.3f} ({ratios[0]:.3f}, {ratios[-1]:.3f}) |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        write_part(text)


if __name__ == "__main__":
    main()
