"""The quantile of Student's distribution, with the standard library alone."""

from __future__ import annotations

import math
from statistics import NormalDist


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
