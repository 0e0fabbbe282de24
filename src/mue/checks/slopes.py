"""Slopes in log-log with their intervals, and what a rule expects of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mue.util.statistics import student_quantile

PASS, FAIL, UNCLEAR = "pass", "fail", "unclear"


@dataclass(frozen=True)
class Slope:
    """How one quantity of one module moves along one axis.

    Attributes:
        quantity: ``"update"`` or ``"size"``, or ``"change of output"`` by some weights. slope, low, high: d log value / d log x
            with its 95 % interval. expected: the range the rule predicts, (0, 0) where it is flat.
        points: (x, value) of every size and seed.
    """

    axis: str
    module: str
    quantity: str
    slope: float
    low: float
    high: float
    expected: tuple[float, float]
    tolerance: float
    points: tuple[tuple[float, float], ...]

    @property
    def verdict(self) -> str:
        """``fail`` where the slope is out of tolerance and its interval does not reach the expected range."""
        a, b = self.expected
        if a - self.tolerance <= self.slope <= b + self.tolerance:
            return PASS
        return FAIL if self.high < a or self.low > b or not math.isfinite(self.slope) else UNCLEAR

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "expected": list(self.expected),
            "points": [list(p) for p in self.points],
            "verdict": self.verdict,
        }


def fitted(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The slope of a power law by least squares in log-log.

    Args:
        points: (size, value), several to a size for several seeds.

    Returns:
        (slope, low, high) with the 95 % interval, infinite for two points; all NaN where a value is not positive and
        finite (a module that never moved has no slope).
    """
    if any(not (math.isfinite(v) and v > 0) for _, v in points):
        return math.nan, math.nan, math.nan
    x, y = [math.log(p[0]) for p in points], [math.log(p[1]) for p in points]
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread = math.fsum((a - mx) ** 2 for a in x)
    slope = math.fsum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / spread
    left = math.fsum((b - my - slope * (a - mx)) ** 2 for a, b in zip(x, y, strict=True))
    freedom = len(x) - 2
    if freedom < 1:
        return slope, -math.inf, math.inf
    half = student_quantile(0.975, freedom) * math.sqrt(left / freedom / spread)
    return slope, slope - half, slope + half
