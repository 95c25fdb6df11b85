"""python -m workload train."""

import argparse
import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from workload.commands.common import (
    RUNS,
    add_command,
    add_device,
    add_settings,
    describe_keys,
    prepare_device,
    stop_on_signals,
)
from workload.config import list_presets
from workload.errors import WorkloadError

if TYPE_CHECKING:
    from workload.commands.common import Commands
    from workload.config import Config
    from workload.parallel import World


def add(commands: "Commands") -> None:
    command = add_command(commands, "train", run, "train a model, or go on training one", describe_keys())
    command.add_argument(
        "--preset", help=f"where the configuration begins (default demo): {', '.join(list_presets())}"
    )
    command.add_argument("--out", type=Path, help="folder of the run (default runs/PRESET-DATE-TIME)")
    add_settings(command, "change the preset; keys are below")
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of --out, or of the newest run; naming the same --out does so too",
    )
    command.add_argument(
        "--compile",
        default="auto",
        choices=("auto", "on", "off"),
        help="torch.compile of the training step; auto: on a GPU",
    )
    command.add_argument(
        "--nproc-per-node",
        metavar="N",
        help="train in N processes under torchrun, one a GPU (gpu: as many as there are)",
    )
    command.add_argument(
        "--nnodes",
        metavar="N",
        type=int,
        default=1,
        help="machines that train it together; each gives this command",
    )
    command.add_argument(
        "--node-rank",
        metavar="I",
        type=int,
        default=0,
        help="of several machines this one's number, 0 … N-1; 0 saves",
    )
    command.add_argument(
        "--rendezvous", metavar="HOST:PORT", default="", help="of several machines where number 0 is reached"
    )
    command.add_argument(
        "--parallel",
        default="",
        choices=("ddp", "fsdp"),
        help="of several processes: each holds the whole model (ddp, default) or a part of it (fsdp)",
    )
    add_device(command)


def run(arguments: argparse.Namespace) -> int:
    """In this process, or in several: started here under torchrun, or this one of those that torchrun started."""
    from workload.launch import checked_nodes, is_worker, launch

    if is_worker(os.environ):
        return run_rank(arguments)
    nodes = checked_nodes(arguments.nnodes, arguments.node_rank, arguments.rendezvous)
    if arguments.nproc_per_node in (None, "1") and nodes.count == 1:
        if arguments.parallel:
            raise WorkloadError(
                f"--parallel {arguments.parallel} is for several processes",
                "say how many with --nproc-per-node, or leave it out",
            )
        from workload.parallel import ALONE

        run_training(arguments, ALONE, stop_on_signals())
        return 0
    argv = arguments.argv
    if nodes.rank == 0:
        out, _ = choose_run(arguments)  # errors are told once, before anything starts
        argv = argv if arguments.out else [*argv, "--out", str(out)]
    elif not arguments.out:
        raise WorkloadError("--out is missing", "machine 0 saves there; on the others data and logs go there")
    return launch(argv, arguments.nproc_per_node or "1", nodes)


def choose_run(arguments: argparse.Namespace) -> "tuple[Path, Config]":
    """Its folder and configuration."""
    from workload.runs import find_newest, name_run, resolve_config

    out: Path = arguments.out or (
        find_newest(RUNS) if arguments.resume else name_run(RUNS, arguments.preset or "demo", datetime.now())
    )
    if arguments.resume and not (out / "config.toml").exists():
        raise WorkloadError(f"{out}: there is no run to resume", "leave out --resume to begin one there")
    return out, resolve_config(out, arguments.preset, arguments.set)


def run_rank(arguments: argparse.Namespace) -> int:
    """One of the processes that torchrun started."""
    from workload.device import choose_device
    from workload.launch import rank_of_launch
    from workload.lifeline import lifeline
    from workload.parallel import joined, local_device, local_threads, read_world

    world = read_world(os.environ, arguments.parallel)
    arguments.device = local_device(arguments.device, world)
    arguments.threads = arguments.threads or local_threads(os.environ)
    with (
        rank_of_launch(os.environ) as rank,
        joined(world, choose_device(arguments.device)),
        lifeline(world, os.environ.get("MASTER_ADDR", ""), rank.end_as_lost),
    ):
        finished = run_training(arguments, world, rank.should_stop)
        world.any(False)  # nobody is done before rank 0 has written all there is
        # Else one machine of several would take for the end what is the reboot of another.
        rank.stopped_elsewhere = world.machines > 1 and not finished and not rank.should_stop()
    return 0


def run_training(arguments: argparse.Namespace, world: "World", should_stop: Callable[[], bool]) -> bool:
    """Train, and say what came of it; of several processes rank 0 does the talking. Whether all steps are done."""
    from workload.compile import compile_loss
    from workload.metrics import load_rows
    from workload.progress import Reporter, format_duration, make_reporter
    from workload.report import save_report
    from workload.train import train

    chosen = world.first(choose_run(arguments) if world.is_first else None)
    assert chosen is not None
    out, config = chosen
    if world.machines > 1 and arguments.out:
        out = arguments.out  # each machine's own
    device, dtype, threads = prepare_device(arguments)
    with (
        open(os.devnull, "w") as nowhere,
        (
            make_reporter(time.monotonic, config.train.log_every)
            if world.is_first
            else Reporter(nowhere, time.monotonic, config.train.log_every)
        ) as reporter,
    ):
        state = train(
            config,
            out,
            device=device,
            dtype=dtype,
            threads=threads,
            reporter=reporter,
            should_stop=should_stop,
            make_loss=lambda model: compile_loss(model.loss, arguments.compile, device, reporter.note),
            world=world,
        )
    finished = state.step >= state.steps
    if not world.is_first:
        return finished
    stopped = state.step < state.steps or should_stop()
    report = save_report(out, "stopped" if stopped else "finished")
    if stopped:
        print(f"stopped at step {state.step} of {state.steps}, saved; go on with")
        print(f"    python -m workload train --resume --out {out}")
        return finished
    rows = list(load_rows(out / "metrics.jsonl"))
    sample = next((row for row in reversed(rows) if row["kind"] == "sample"), None)
    if sample is not None:
        print(f"\n{sample['prompt']}{sample['text']}\n")
    scores = [row for row in rows if row["kind"] == "eval"]
    print(
        f"trained {state.step} steps in {format_duration(state.elapsed_s)}: validation loss "
        f"{scores[0]['val_loss']:.4f} -> {scores[-1]['val_loss']:.4f}, "
        f"{scores[0]['val_bits_per_byte']:.4f} -> {scores[-1]['val_bits_per_byte']:.4f} bits/byte"
    )
    print(f"report   {report}")
    print(f"more     python -m workload sample {out}")
    return finished
