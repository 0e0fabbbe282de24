"""Early stopping: only what is far behind is stopped, and only once there is something to compare with."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mue.lab.pruning import hopeless

STEPS = 100
Curve = list[tuple[int, float]]


def curve(rate: float, upto: int = STEPS) -> Curve:
    """From 6 towards 2, the faster the higher the rate."""
    return [(s, 2 + 4 * math.exp(-rate * s / STEPS)) for s in range(5, upto + 1, 5)]


FINISHED = [curve(8.0), curve(6.0), curve(5.0)]


def test_a_run_far_behind_is_stopped_at_half_time_and_not_before() -> None:
    assert not hopeless(curve(0.3, 45), FINISHED, STEPS)
    assert hopeless(curve(0.3, 50), FINISHED, STEPS)


@pytest.mark.parametrize("rate", [9.0, 6.0, 3.0])
def test_control_a_run_that_catches_up_is_not_stopped(rate: float) -> None:
    assert not any(hopeless(curve(rate, upto), FINISHED, STEPS) for upto in range(5, 101, 5))


def test_nothing_is_stopped_with_nothing_to_compare_with() -> None:
    assert not hopeless(curve(0.3), [], STEPS)
    assert not hopeless([], FINISHED, STEPS)
    bad = [[(s, math.nan) for s in range(5, 101, 5)]] * 3
    assert not hopeless(curve(0.3), bad, STEPS) and not hopeless(curve(0.3), [[], [], []], STEPS)


def test_what_may_have_diverged_is_left_to_the_trainer() -> None:
    for loss in (math.nan, math.inf):
        assert not hopeless([*curve(0.3, 50), (55, loss)], FINISHED, STEPS)


@given(shift=st.floats(-5, 5), scale=st.floats(0.01, 100), rate=st.floats(0.05, 9), upto=st.sampled_from([50, 75, 95]))
def test_the_unit_of_the_loss_does_not_matter(shift: float, scale: float, rate: float, upto: int) -> None:
    def other(c: Curve) -> Curve:
        return [(step, scale * (loss + shift)) for step, loss in c]

    here = hopeless(curve(rate, upto), FINISHED, STEPS)
    edge = {hopeless(curve(rate * f, upto), FINISHED, STEPS) for f in (0.999, 1.001)}
    assert hopeless(other(curve(rate, upto)), [other(c) for c in FINISHED], STEPS) == here or len(edge) > 1


def test_one_noisy_batch_does_not_stop_a_run() -> None:
    noisy = curve(6.0, 60)
    noisy[-1] = (60, 4.0)
    assert not hopeless(noisy, FINISHED, STEPS)
