"""What a person sees while a run trains: one live line on a terminal, plain flushed lines elsewhere."""

import math
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LONGEST_SILENCE_S = 15.0  # a plain line at least this often, whatever log_every says
NO_SENSORS: Mapping[str, float] = {}


class Reporter:
    """Collects what `train` tells, and shows it. Use as a context manager."""

    def __init__(self, stream: TextIO, clock: Callable[[], float], log_every: int) -> None:
        self._stream, self._clock, self._log_every = stream, clock, log_every
        self._live = _make_live(stream) if stream.isatty() else None
        self._val = ""
        self._tokens, self._since = 0, clock()  # tokens seen since when
        self._shown = self._paused = self._since
        self._losses: list[float] = []

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def validated(self, step: int, loss: float, bits_per_byte: float) -> None:
        """The validation loss in nats a token; later lines repeat it."""
        self._val = f"  val {loss:.4f} = {bits_per_byte:.4f} bits/byte"
        self.note(f"step {step}: validation loss {loss:.4f}, {bits_per_byte:.4f} bits/byte")

    def pause(self) -> None:
        """Time from here to `go_on` is not training: leave it out of tokens/s."""
        self._paused = self._clock()

    def go_on(self) -> None:
        paused_s = self._clock() - self._paused
        self._since += paused_s
        self._shown += paused_s

    def step(
        self,
        step: int,
        steps: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens: int,
        mfu: float | None = None,
        gpu: Mapping[str, float] = NO_SENSORS,
    ) -> None:
        """One update is done. `tokens` it saw; shown are means since the last line.

        mfu: the part of the device's peak that was used, 0 … 1. gpu: what telemetry.py reads.
        """
        self._tokens += tokens
        self._losses.append(loss)
        now = self._clock()
        due = step % self._log_every == 0 or step == steps or now - self._shown > LONGEST_SILENCE_S
        if not (due or self._live is not None):
            return
        rate = self._tokens / max(now - self._since, 1e-9)
        eta_s = (steps - step) * tokens / max(rate, 1e-9)
        line = (
            f"step {step:>{len(str(steps))}}/{steps}  loss {sum(self._losses) / len(self._losses):.4f}{self._val}"
            f"  lr {lr:.2e}  grad {grad_norm:.2f}  {rate:,.0f} tok/s  eta {format_duration(eta_s)}"
        )
        if self._live is not None:
            self._live.update(self._live.task_ids[0], total=steps, completed=step, description=line)
        else:
            print(line, file=self._stream, flush=True)
        if due:
            self._tokens, self._since, self._shown = 0, now, now
            self._losses.clear()

    def __enter__(self) -> "Reporter":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def _make_live(stream: TextIO) -> Progress:
    live = Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), console=Console(file=stream))
    live.add_task("", total=1)
    return live


def format_duration(seconds: float) -> str:
    """0:07, 12:34, 1:02:03, 3 d 4:05:06."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def make_reporter(clock: Callable[[], float], log_every: int) -> Reporter:
    return Reporter(sys.stdout, clock, log_every)
