"""What a person sees while a run trains: a live panel on a terminal, plain flushed lines elsewhere."""

import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live

from workload.panel import View, format_duration, gpu_cells, render_panel

__all__ = ["Reporter", "format_duration", "make_reporter"]

LONGEST_SILENCE_S = 15.0  # a plain line at least this often, whatever log_every says
NO_SENSORS: Mapping[str, float] = {}
RECENT = 50  # steps whose mean the panel shows
MOST_LOSSES = 256  # of the sparkline; four to a block at its widest
FRAMES_PER_S = 4.0
SHORT_PAUSE_S = 1.0  # a pause shorter than this is not mentioned


class Reporter:
    """Collects what `train` tells, and shows it. Use as a context manager."""

    def __init__(self, stream: TextIO, clock: Callable[[], float], log_every: int) -> None:
        self._stream, self._clock, self._log_every = stream, clock, log_every
        console = Console(file=stream) if stream.isatty() else None
        # One that cannot move its cursor (TERM=dumb, an editor's) gets the lines.
        self._console = console if console is not None and not console.is_dumb_terminal else None
        self._live: Live | None = None
        self._view: View | None = None
        self._val: tuple[float, float] | None = None
        self._best: tuple[float, int] | None = None
        self._begun = self._last = self._shown = clock()  # when training, the last step, the last line were
        self._paused: float | None = None
        self._seen = 0  # steps
        # What the next line or frame is the mean of: lines of all since the last one, the panel of the newest.
        self._recent: deque[Seen] = deque(maxlen=RECENT if self._console is not None else None)
        self._history = History(MOST_LOSSES)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def validated(self, step: int, loss: float, bits_per_byte: float) -> None:
        """The validation loss in nats a token; later lines repeat it."""
        self._val = (loss, bits_per_byte)
        if self._best is None or loss < self._best[0]:
            self._best = (loss, step)
        self.note(f"step {step}: validation loss {loss:.4f}, {bits_per_byte:.4f} bits/byte")

    def pause(self) -> None:
        """Time from here to `go_on` is not training: leave it out of tokens/s."""
        self._paused = self._clock()

    def go_on(self) -> None:
        now = self._clock()
        if not self._seen:  # what came before the first step was loading, and no training either
            self._last = self._shown = now
        elif self._paused is not None:
            self._last += now - self._paused
            self._shown += now - self._paused
        self._paused = None

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
        """One update is done. `tokens` it saw; shown are means of the steps since the last line, on a panel of the last RECENT.

        mfu: the part of the device's peak that was used, 0 … 1. gpu: what telemetry.py reads.
        """
        now = self._clock()
        self._seen += 1
        self._recent.append(Seen(loss, tokens, now - self._last, mfu))
        self._last = now
        recent = self._recent
        rate = sum(seen.tokens for seen in recent) / max(sum(seen.seconds for seen in recent), 1e-9)
        mfus = [seen.mfu for seen in recent if seen.mfu is not None]
        view = View(
            step=step,
            steps=steps,
            loss=_mean([seen.loss for seen in recent if math.isfinite(seen.loss)] or [math.nan]),
            lr=lr,
            grad_norm=grad_norm,
            rate=rate,
            eta_s=(steps - step) * tokens / max(rate, 1e-9),
            elapsed_s=now - self._begun,
            mfu=_mean(mfus) if mfus else None,
            gpu=gpu,
            val=self._val,
            best=self._best,
        )
        if self._live is not None:
            self._history.add(loss)
            self._view = replace(view, losses=tuple(self._history.means))  # drawn by a thread of its own
        elif step % self._log_every == 0 or step == steps or now - self._shown > LONGEST_SILENCE_S:
            print(render_line(view), file=self._stream, flush=True)
            self._shown = now
            self._recent.clear()

    def _render(self) -> RenderableType:
        assert self._console is not None
        view, paused = self._view, self._paused
        if view is None:
            return ""
        if paused is not None and self._clock() - paused > SHORT_PAUSE_S:
            view = replace(view, doing="saving or evaluating")
        return render_panel(view, self._console.width, self._console.height)

    def __enter__(self) -> "Reporter":
        if self._console is not None:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=FRAMES_PER_S
            )
            self._live.start()
            # Hidden, it would stay so when the process is killed, as by a second Ctrl-C.
            self._console.show_cursor(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def render_line(view: View) -> str:
    """The plain line of a step."""
    val = f"  val {view.val[0]:.4f} = {view.val[1]:.4f} bits/byte" if view.val else ""
    used = f"  mfu {view.mfu:.1%}" if view.mfu is not None else ""
    sensors = "".join(f"  {label} {value}" if label else f"  {value}" for label, value in gpu_cells(view.gpu))
    return (
        f"step {view.step:>{len(str(view.steps))}}/{view.steps}  loss {view.loss:.4f}{val}  lr {view.lr:.2e}"
        f"  grad {view.grad_norm:.2f}  {view.rate:,.0f} tok/s{used}{sensors}  eta {format_duration(view.eta_s)}"
    )


@dataclass(frozen=True)
class Seen:
    """One step."""

    loss: float
    tokens: int
    seconds: float
    mfu: float | None


class History:
    """Means of a series of any length in at most `most` numbers, each of as many neighbours."""

    def __init__(self, most: int) -> None:
        self.means: list[float] = []
        self._most, self._size = most, 1
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """Values that are not finite are left out."""
        if not math.isfinite(value):
            return
        self._open.append(value)
        if len(self._open) < self._size:
            return
        self.means.append(_mean(self._open))
        self._open.clear()
        if len(self.means) == self._most:
            self.means = [_mean(self.means[i : i + 2]) for i in range(0, self._most, 2)]
            self._size *= 2


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def make_reporter(clock: Callable[[], float], log_every: int) -> Reporter:
    return Reporter(sys.stdout, clock, log_every)
