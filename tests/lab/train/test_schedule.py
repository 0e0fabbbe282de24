"""The schedule of the learning rate."""

from __future__ import annotations

import pytest

from mue.lab.train.run import Settings
from mue.lab.train.schedule import lr_factor
from support.small_run import TUNED


@pytest.mark.parametrize("steps", [10, 100, 1000])
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_schedule_is_a_fraction_of_the_run(schedule: str, steps: int) -> None:
    tuned = TUNED.replace(warmup=0.1, floor=0.1)
    settings = Settings(schedule=schedule, decay=0.2)
    factors = [lr_factor(step, steps, tuned, settings) for step in range(steps)]
    assert max(factors) == pytest.approx(1.0, abs=0.03)
    assert all(0 < f <= 1 for f in factors)
    assert factors[round(0.1 * steps) - 1] == 1.0
    assert factors[-1] < 0.5
    assert factors[-1] >= 0.1
    middle = factors[round(0.6 * steps)]
    assert middle == 1.0 if schedule == "wsd" else 0.2 < middle < 0.8
