"""Means and shares with intervals, and the quantile of Student's distribution, with the standard library alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Mean:
    """A mean and the half-width of its 95 % interval, infinite where one sample says nothing of it."""

    value: float
    half: float

    def to_list(self) -> list[float | None]:
        """Value, low and high, for JSON."""
        ends = (self.value - self.half, self.value + self.half) if math.isfinite(self.half) else (None, None)
        return [self.value, *ends]

    def text(self, digits: int) -> str:
        """As tables print it."""
        return (
            f"{self.value:.{digits}f} ± {self.half:.{digits}f}"
            if math.isfinite(self.half)
            else f"{self.value:.{digits}f}"
        )


def mean_of(samples: Sequence[float], weights: Sequence[float] | None = None) -> Mean:
    """The mean of independent samples with its interval by Student's distribution.

    Args:
        samples: at least one. weights: then it is Σ samples / Σ weights, as of losses over bytes; its interval is that of the linear
            part, samples - ratio · weights.
    """
    n = len(samples)
    weights = [1.0] * n if weights is None else weights
    share = math.fsum(weights) / n
    value = math.fsum(samples) / n / share
    if n < 2:
        return Mean(value, math.inf)
    variance = math.fsum((x - value * w) ** 2 for x, w in zip(samples, weights, strict=True)) / (n - 1)
    return Mean(value, student_quantile(0.975, n - 1) * math.sqrt(variance / n) / share)


def share_interval(hits: int, n: int) -> tuple[float, float, float]:
    """A share with the ends of its 95 % interval (Wilson 1927), which are inside 0 and 1 and not both at the share where all or none hit.

    Args:
        hits: of ``n`` independent trials, at least one.
    """
    z = NormalDist().inv_cdf(0.975)
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    # at 0 and 1 the share is an end of its interval, but for rounding
    return share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def student_quantile(p: float, freedom: float) -> float:
    """The quantile of Student's t distribution.

    Bisection on the finite series of Abramowitz & Stegun, 26.7.3 and 26.7.4.

    Args:
        p: a probability above 1/2; 0.975 gives the half-width of a 95 % interval in standard errors.
        freedom: degrees of freedom, a whole number, or inf for the normal distribution.
    """
    if math.isinf(freedom):
        return NormalDist().inv_cdf(p)
    n = int(freedom)

    def central(t: float) -> float:
        """P(|T| < t)."""
        theta = math.atan2(t, math.sqrt(n))
        c2 = math.cos(theta) ** 2
        term = math.cos(theta) if n % 2 else 1.0
        total = 0.0
        for k in range(1 + n % 2, n, 2):
            total += term
            term *= c2 * k / (k + 1)
        if n % 2:
            return (2 / math.pi) * (theta + math.sin(theta) * total)
        return math.sin(theta) * total

    low, high = 0.0, 1.0
    while central(high) < 2 * p - 1:
        high *= 2
    # halved until nothing is left to halve: a double has 53 bits
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle) < 2 * p - 1 else (low, middle)
    return (low + high) / 2
