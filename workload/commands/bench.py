"""python -m workload bench."""

import argparse
from typing import TYPE_CHECKING

from workload.commands.common import add_command, add_device, add_settings, describe_keys, prepare_device
from workload.config import list_presets
from workload.errors import WorkloadError

if TYPE_CHECKING:
    from workload.commands.common import Commands


def add(commands: "Commands") -> None:
    command = add_command(
        commands, "bench", run, "measure how fast a model trains and samples here", describe_keys()
    )
    command.add_argument(
        "--preset", default="gpt2-124m", help=f"default gpt2-124m; {', '.join(list_presets())}"
    )
    add_settings(command, "change the preset, for example micro_batch=8; keys are below")
    command.add_argument("--steps", type=int, default=10, help="measured after 3 to warm up (default 10)")
    command.add_argument("--tokens", type=int, default=64, help="to sample (default 64)")
    command.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto", help="auto: on a GPU (default)"
    )
    command.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    add_device(command)


def run(arguments: argparse.Namespace) -> int:
    import dataclasses
    import json
    import sys

    from workload.bench import render_result, run_bench
    from workload.config import load_config

    if arguments.steps < 1 or arguments.tokens < 2:
        raise WorkloadError(
            f"--steps {arguments.steps} --tokens {arguments.tokens}: at least 1 step and 2 tokens are measured"
        )
    config = load_config(arguments.preset, arguments.set)
    device, dtype, _ = prepare_device(arguments)
    result = run_bench(
        config,
        device=device,
        dtype=dtype,
        compile_mode=arguments.compile,
        steps=arguments.steps,
        sample_tokens=arguments.tokens,
        note=lambda text: print(f"note     {text}", file=sys.stderr),
    )
    print(json.dumps(dataclasses.asdict(result)) if arguments.json else render_result(result))
    return 0
