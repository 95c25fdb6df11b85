"""What a person sees while a run trains."""

import io

import pytest

from workload.progress import Reporter, format_duration


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


def test_a_terminal_shows_one_live_line_and_notes_stay_above_it() -> None:
    stream, clock = Terminal(), Clock()
    with Reporter(stream, clock, 100) as reporter:
        clock.now += 1.0
        reporter.step(1, 3, loss=4.25, lr=1e-3, grad_norm=0.1, tokens=1000)
        reporter.note("[kept] as it is")
    assert "4.2500" in stream.getvalue()
    assert "[kept] as it is" in stream.getvalue()


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
