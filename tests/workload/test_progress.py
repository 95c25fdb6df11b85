"""What a person sees while a run trains."""

import io
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

import pytest

from workload.progress import History, Reporter, format_duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_at_their_interval_with_means_since_the_last() -> None:
    stream, clock = io.StringIO(), Clock()
    with Reporter(stream, clock, 2) as reporter:
        for step in range(1, 5):
            clock.now += 0.5
            reporter.step(step, 100, loss=float(step), lr=1e-3, grad_norm=0.25, tokens=1000)
        reporter.validated(4, 1.5, 2.164)
        reporter.pause()
        clock.now += 1000.0  # evaluating is not training
        reporter.go_on()
        for step in (5, 6):
            clock.now += 0.5
            reporter.step(step, 100, loss=float(step), lr=1e-3, grad_norm=0.25, tokens=1000)
    assert stream.getvalue().splitlines() == [
        "step   2/100  loss 1.5000  lr 1.00e-03  grad 0.25  2,000 tok/s  eta 0:49",
        "step   4/100  loss 3.5000  lr 1.00e-03  grad 0.25  2,000 tok/s  eta 0:48",
        "step 4: validation loss 1.5000, 2.1640 bits/byte",
        "step   6/100  loss 5.5000  val 1.5000 = 2.1640 bits/byte  lr 1.00e-03  grad 0.25  2,000 tok/s  eta 0:47",
    ]


def test_slow_steps_do_not_wait_for_the_interval() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = Reporter(stream, clock, 1000)
    for step in range(1, 5):
        clock.now += 10.0
        reporter.step(step, 5000, loss=1.0, lr=1e-3, grad_norm=0.1, tokens=1000)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["2/5000", "4/5000"]


def test_every_line_is_flushed() -> None:
    flushed = []

    class Log(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    reporter = Reporter(Log(), Clock(), 1)
    reporter.note("a line")
    assert flushed[-1] == "a line\n"
    reporter.step(1, 2, loss=1.0, lr=1.0, grad_norm=1.0, tokens=1)
    assert "step 1/2" in flushed[-1]


def test_a_line_says_what_the_gpu_does_where_there_is_one() -> None:
    stream, clock = io.StringIO(), Clock()
    with Reporter(stream, clock, 2) as reporter:
        for step, mfu in ((1, 0.4), (2, 0.5)):
            clock.now += 0.5
            gpu = {"memory_bytes": 17.24e9, "temperature_c": 61.0, "power_w": 287.4}
            reporter.step(step, 2, loss=1.0, lr=1e-3, grad_norm=0.1, tokens=1000, mfu=mfu, gpu=gpu)
    assert stream.getvalue().endswith(
        "grad 0.10  2,000 tok/s  mfu 45.0%  gpu 17.2 GB  61 °C  287 W  eta 0:00\n"
    )


def test_loading_before_the_first_step_is_not_training_and_a_loss_that_is_not_finite_is_no_mean() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = Reporter(stream, clock, 2)
    clock.now += 100.0  # the data, the model
    reporter.pause()
    clock.now += 100.0  # the first evaluation
    reporter.go_on()
    for step, loss in ((1, 4.0), (2, float("nan"))):
        clock.now += 0.5
        reporter.step(step, 10, loss=loss, lr=1e-3, grad_norm=0.1, tokens=1000)
    assert "loss 4.0000" in stream.getvalue()
    assert "2,000 tok/s" in stream.getvalue()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    return Terminal()


def plain(text: str) -> str:
    """Without what colours it and moves the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_shows_a_panel_and_notes_stay_above_it(terminal: Terminal) -> None:
    clock = Clock()
    with Reporter(terminal, clock, 100) as reporter:
        for step in (1, 2, 3):
            clock.now += 0.5
            reporter.step(step, 4, loss=4.0 + step, lr=1e-3, grad_norm=0.1, tokens=1000, mfu=0.25)
        reporter.validated(3, 4.125, 5.95)
        reporter.note("[kept] as it is")
        clock.now += 0.5
        reporter.step(4, 4, loss=8.0, lr=1e-3, grad_norm=0.1, tokens=1000, mfu=0.35)
    last_frame = plain(terminal.getvalue()).rpartition("╭")[2]
    for part in ("4/4", "loss 6.5000", "val 4.1250", "2,000 tok/s", "mfu 27.5%", "eta 0:00", "▁", "█"):
        assert part in last_frame
    assert "[kept] as it is\n" in plain(terminal.getvalue()).replace("\r", "")
    assert "step 3: validation loss 4.1250, 5.9500 bits/byte" in plain(terminal.getvalue())


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Reporter(terminal, Clock(), 1) as reporter:
        reporter.step(1, 3, loss=4.25, lr=1e-3, grad_norm=0.1, tokens=1000)
    assert terminal.getvalue().startswith("step 1/3  loss 4.2500")


def test_the_terminal_has_its_cursor_after_a_kill() -> None:
    """A real terminal; SIGKILL stands for every end that asks nobody, such as a second Ctrl-C."""
    code = (
        "import sys, time\n"
        "from workload.progress import make_reporter\n"
        "with make_reporter(time.monotonic, 1) as reporter:\n"
        "    reporter.step(1, 9, loss=1.0, lr=1.0, grad_norm=1.0, tokens=1)\n"
        "    print('ready', file=sys.__stderr__, flush=True)\n"
        "    time.sleep(60)\n"
    )
    outer, inner = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=inner,
            stdin=inner,
            stderr=subprocess.PIPE,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        ) as child:
            assert child.stderr is not None
            assert child.stderr.readline() == b"ready\n"
            child.kill()
        os.set_blocking(outer, False)  # all of it is there
        seen = b""
        with suppress(OSError):
            while part := os.read(outer, 4096):
                seen += part
    finally:
        os.close(inner)
        os.close(outer)
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")


def test_a_history_of_any_length_is_short_and_its_means_are_of_as_many() -> None:
    history = History(8)
    for value in range(100):
        history.add(float(value))
    history.add(float("inf"))
    assert history.means == [7.5, 23.5, 39.5, 55.5, 71.5, 87.5]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0:00"),
        (59.6, "1:00"),
        (754, "12:34"),
        (3723, "1:02:03"),
        (273906, "3 d 4:05:06"),
        (float("inf"), "?"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
