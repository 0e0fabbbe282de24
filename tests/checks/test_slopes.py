"""Slopes over sizes: intervals and verdicts."""

from __future__ import annotations

import math

import pytest

from mue.checks.slopes import FAIL, Slope, fitted


def test_slopes_have_intervals_and_verdicts() -> None:
    points = [(float(x), 3 * x**0.5 * f) for x in (64, 128, 256) for f in (0.98, 1.0, 1.02)]
    slope, low, high = fitted(points)
    assert slope == pytest.approx(0.5) and low < 0.5 < high and high - low < 0.1
    made = Slope("width", "stream", "update", slope, low, high, (0.0, 0.0), 0.2, tuple(points))
    assert made.verdict == FAIL
    assert Slope("width", "stream", "update", slope, low, high, (0.5, 0.5), 0.2, ()).verdict == "pass"
    assert Slope("width", "stream", "update", 0.3, -0.4, 1.0, (0.0, 0.0), 0.2, ()).verdict == "unclear"
    assert math.isnan(fitted([(1, 0.0), (2, 1.0)])[0])
