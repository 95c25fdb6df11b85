"""Learning rate and time budget, as numbers."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workload.config import SCHEDULES, TrainConfig
from workload.schedule import fit_steps, learning_rate

TRAIN = TrainConfig(steps=100, lr=1.0, lr_end=0.1, warmup=10)


@pytest.mark.parametrize(
    ("step", "rate"),
    # by hand: linear to step 9, then 0.1 + 0.9 · (1 + cos(π · (step - 9) / 90)) / 2
    [(0, 0.1), (4, 0.5), (9, 1.0), (24, 0.939711), (39, 0.775), (54, 0.55), (69, 0.325), (99, 0.1)],
)
def test_golden_values(step: int, rate: float) -> None:
    assert learning_rate(step, 100, TRAIN) == pytest.approx(rate, abs=1e-6)


WSD = dataclasses.replace(TRAIN, schedule="wsd", decay=0.25)


@pytest.mark.parametrize(
    ("step", "rate"),
    # by hand: linear to step 9, 1 to step 74, then 0.1 + 0.9 · (1 - √((step - 74) / 25))
    [
        (0, 0.1),
        (4, 0.5),
        (9, 1.0),
        (50, 1.0),
        (74, 1.0),
        (75, 0.82),
        (78, 0.64),
        (83, 0.46),
        (90, 0.28),
        (99, 0.1),
    ],
)
def test_golden_values_of_wsd(step: int, rate: float) -> None:
    assert learning_rate(step, 100, WSD) == pytest.approx(rate, abs=1e-6)


def test_wsd_is_the_same_for_a_longer_run_until_it_cools_down() -> None:
    rates = [[learning_rate(step, steps, WSD) for step in range(75)] for steps in (100, 200)]
    assert rates[0] == rates[1]
    all_of_it = dataclasses.replace(WSD, decay=1.0)
    assert learning_rate(9, 100, all_of_it) == 1.0
    assert learning_rate(10, 100, all_of_it) == pytest.approx(0.1 + 0.9 * (1 - (1 / 90) ** 0.5))
    one = dataclasses.replace(WSD, decay=0.001)
    assert [learning_rate(step, 100, one) for step in (98, 99)] == [1.0, pytest.approx(0.1)]


def test_no_warmup_and_runs_shorter_than_it() -> None:
    assert learning_rate(0, 100, dataclasses.replace(TRAIN, warmup=0)) == pytest.approx(1.0, abs=1e-3)
    short = [learning_rate(step, 8, TRAIN) for step in range(8)]
    assert short[:4] == [0.25, 0.5, 0.75, 1.0]
    assert short[-1] == pytest.approx(0.1)
    assert learning_rate(0, 1, TRAIN) == pytest.approx(0.1)


@settings(deadline=None)  # other work on the machine is not an error
@given(
    st.integers(1, 500), st.integers(0, 600), st.floats(0, 1), st.sampled_from(SCHEDULES), st.floats(0.01, 1)
)
def test_rates_stay_between_zero_and_the_peak(
    steps: int, warmup: int, end: float, schedule: str, decay: float
) -> None:
    train = dataclasses.replace(TRAIN, warmup=warmup, lr_end=end, schedule=schedule, decay=decay)
    rates = [learning_rate(step, steps, train) for step in range(steps)]
    assert all(0 <= rate <= 1 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(end)


def test_steps_are_fitted_into_the_time() -> None:
    # 20 steps since step 10 took 20 s: 60 s hold 60 - 32 = 28 more
    assert fit_steps(30, 100, 100, 32.0, 60.0, (10, 12.0)) == 58
    assert (
        fit_steps(30, 40, 100, 32.0, 60.0, (10, 12.0)) == 58
    )  # planned too few: others have left the machine
    assert fit_steps(30, 40, 50, 32.0, 60.0, (10, 12.0)) == 50  # but never more than asked for
    assert fit_steps(30, 100, 100, 32.0, 0.0, (10, 12.0)) == 100  # no limit
    assert fit_steps(30, 100, 100, 32.0, 200.0, (10, 12.0)) == 100  # fast enough
    assert fit_steps(30, 59, 100, 32.0, 60.0, (10, 12.0)) == 59  # one too many is within the tolerance
    assert fit_steps(30, 100, 100, 75.0, 60.0, (10, 12.0)) == 31  # too late: end with the next
    assert fit_steps(100, 100, 100, 75.0, 60.0, (10, 12.0)) == 100


@settings(deadline=None)  # other work on the machine is not an error
@given(st.integers(1, 99), st.integers(100, 200), st.floats(0.1, 1e4), st.floats(1, 1e4))
def test_the_plan_stays_between_what_is_done_and_what_was_asked(
    step: int, asked: int, elapsed: float, limit: float
) -> None:
    assert step < fit_steps(step, 100, asked, elapsed, limit, (0, 0.0)) <= asked
