"""The schedule of the learning rate."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from mue.lab.train.run import Settings
from mue.lab.train.schedule import SCHEDULES, lr_factor
from mue.shapes import HParams
from support.small_run import TUNED


@pytest.mark.parametrize("steps", [10, 100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_is_a_fraction_of_the_run(schedule: str, steps: int) -> None:
    tuned = TUNED.replace(warmup=0.1, floor=0.1)
    factors = rates(steps, tuned, schedule=schedule, shift=steps if schedule == "wsqd" else 0)
    assert max(factors) == pytest.approx(1.0, abs=0.03)
    assert all(0 < f <= 1 for f in factors)
    assert factors[round(0.1 * steps) - 1] == 1.0
    assert factors[-1] < 0.5
    assert factors[-1] >= 0.1
    middle = factors[round(0.6 * steps)]
    low, high = {"wsd": (1, 1), "wsqd": (0.75, 0.9)}.get(schedule, (0.2, 0.8))
    assert low <= middle <= high
    # once up, it never rises
    assert all(b <= a for a, b in itertools.pairwise(factors[round(0.1 * steps) - 1 :]))


def rates(steps: int, tuned: HParams, **settings: Any) -> list[float]:
    chosen = Settings(**settings)
    return [lr_factor(step, steps, tuned, chosen) for step in range(steps)]


def test_linear_falls_in_equal_steps_to_one_above_zero() -> None:
    factors = rates(100, TUNED.replace(warmup=0.1, floor=0.0), schedule="linear")
    falls = {round(a - b, 12) for a, b in itertools.pairwise(factors[9:])}
    assert falls == {round(1 / 91, 12)} and factors[-1] == pytest.approx(1 / 91)


def test_wsqd_has_one_base_for_every_length_if_its_warmup_is_counted_in_steps() -> None:
    """2607.10959: c0/√(t + T0) up to the decay, which alone knows the length; linear from there to the floor."""
    tuned = TUNED.replace(warmup=10, floor=0.0)
    short, long = (rates(steps, tuned, schedule="wsqd", decay=0.2, shift=50) for steps in (100, 400))
    assert short[:80] == long[:80] and short[10:80] == [math.sqrt(50 / (50 + t)) for t in range(70)]
    assert long[319] == pytest.approx(math.sqrt(50 / (50 + 309))) and long[100] != short[99]
    falls = {round(a - b, 12) for a, b in itertools.pairwise(short[79:])}
    assert len(falls) == 1 and short[-1] == pytest.approx(short[79] / 21)
    # the controls: a warmup that grows with the run moves the base, and so does another shift
    grown = TUNED.replace(warmup=0.1, floor=0.0)
    assert rates(100, grown, schedule="wsqd", shift=50)[:80] != rates(400, grown, schedule="wsqd", shift=50)[:80]
    assert rates(100, tuned, schedule="wsqd", shift=5000)[79] > short[79]


def test_wsqd_stays_at_its_floor_once_its_base_has_come_down_to_it() -> None:
    factors = rates(10_000, TUNED.replace(warmup=100, floor=0.1), schedule="wsqd", decay=0.2, shift=50)
    after = factors[99:]
    assert all(b <= a for a, b in itertools.pairwise(after)) and min(after) == factors[7999] == factors[-1] == 0.1
    # the control: above the floor it is the base, which alone would go on below
    assert factors[1000] == math.sqrt(50 / (50 + 900)) and math.sqrt(50 / (50 + 7899)) < 0.08


def test_wsqd_becomes_wsd_as_its_shift_grows() -> None:
    tuned = TUNED.replace(warmup=0.1, floor=0.1)
    wsd, wsqd = rates(200, tuned, schedule="wsd"), rates(200, tuned, schedule="wsqd", shift=10**9)
    assert wsqd == pytest.approx(wsd, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"schedule": "wsqd"},
            "shift of wsqd .the steps of the run it was tuned on. must be a whole number of at least 1",
        ),
        ({"schedule": "wsd", "shift": 10}, 'shift = 10 is read by schedule = "wsqd" alone'),
        ({"schedule": "sqrt"}, "schedule must be one of wsd, cosine, linear, wsqd"),
    ],
)
def test_settings_that_no_schedule_reads(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)
    assert "shift" not in Settings().to_dict() and Settings(schedule="wsqd", shift=9).to_dict()["shift"] == 9
