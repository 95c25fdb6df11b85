"""Twenty training steps on every card at once, or on the processor: `speed.py SOURCE STEPS`, the workload's folder.

What a card should do is told by its peak: GPT-2 with 124M parameters, compiled, trains at 30 to 55 % of that on Ampere
to Hopper, by what nanoGPT and llm.c publish. EXPECTED is the lower end; below half of it something is wrong.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any, TextIO

EXPECTED = 0.30  # of the peak
POLL_S = 5
ON_CARDS = ("--preset", "gpt2-124m")
ON_PROCESSOR = ("--preset", "demo", "--set", "micro_batch=2")


def count_cards() -> int:
    try:
        seen = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    return sum(line.startswith("GPU ") for line in seen.stdout.splitlines())


def start(source: str, steps: str, card: int | None, errors: TextIO) -> "subprocess.Popen[str]":
    chosen = {} if card is None else {"CUDA_VISIBLE_DEVICES": str(card)}
    environment = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **chosen}
    what = ON_PROCESSOR if card is None else ON_CARDS
    argv = [sys.executable, "-m", "workload", "bench", *what, "--steps", steps, "--tokens", "2", "--json"]
    # From there, for Python looks for the package where it is before it looks anywhere else.
    return subprocess.Popen(
        argv, cwd=source, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    )


def judge(card: int | None, result: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines to print, and whether it is as fast as it should be."""
    speed, mfu = float(result["tokens_per_s"]), result["mfu"]
    model = (
        f"{result['parameters'] / 1e6:.0f}M parameters, {result['micro_batch']} x {result['n_ctx']} tokens"
    )
    said = f"{result['environment'].split(', torch')[0]}: {speed:,.0f} tokens/s ({model})"
    figure = "tokens_per_s" if card is None else f"card{card}_tokens_per_s"
    lines = [f"figure {figure} {speed:.1f}"]
    if card is not None and not result["compiled"]:
        said += "; torch.compile failed"
    if mfu is None:
        return [*lines, f"{said}; what it should do is not known"], True
    good = float(mfu) >= EXPECTED / 2
    expected = speed * EXPECTED / float(mfu)
    less = "" if good else " less than half of the"
    return [
        *lines,
        f"figure card{card}_mfu {float(mfu):.4f}",
        f"{said}, {float(mfu):.0%} of its peak;{less} {expected:,.0f} expected",
    ], good


def main(source: str, steps: str) -> int:
    cards: list[int | None] = list(range(count_cards())) or [None]
    good = True
    with tempfile.TemporaryFile("w+") as errors:
        running = [start(source, steps, card, errors) for card in cards]
        began = time.monotonic()
        while any(process.poll() is None for process in running):
            tell(f"training steps: {time.monotonic() - began:.0f} s")
            time.sleep(POLL_S if time.monotonic() - began > POLL_S else 0.2)
        for card, process in zip(cards, running, strict=True):
            said = process.communicate()[0]
            if process.returncode:
                errors.seek(0)
                print(
                    f"{'the processor' if card is None else f'card {card}'}:",
                    *errors.read().splitlines()[-3:],
                )
                good = False
                continue
            lines, well = judge(card, json.loads(said))
            print("\n".join(lines))
            good = good and well
    return 0 if good else 1


def tell(text: str) -> None:
    if "TELL_FD" in os.environ:
        os.write(int(os.environ["TELL_FD"]), f"{text}\n".encode())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
