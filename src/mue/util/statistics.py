"""Two laws of probability that numpy does not have: the normal and Student's."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

__all__ = ["normal_cdf", "student_quantile"]

Array = npt.NDArray[np.float64]


def normal_cdf(z: Array) -> Array:
    """The normal law's distribution function to 1e-7 (Abramowitz & Stegun 26.2.17)."""
    t = 1 / (1 + 0.2316419 * np.abs(z))
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-0.5 * np.minimum(z * z, 1400)) / math.sqrt(2 * math.pi) * series
    return np.asarray(np.where(z > 0, 1 - tail, tail))


def student_quantile(p: float, freedom: float) -> float:
    """Quantile of Student's t for p > 1/2 and a whole number of degrees of freedom, or inf for the normal law.

    Bisection on the finite series of Abramowitz & Stegun 26.7.3 and 26.7.4.
    """
    if math.isinf(freedom):
        return NormalDist().inv_cdf(p)
    n = int(freedom)

    def central(t: float) -> float:  # P(|T| < t)
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
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle) < 2 * p - 1 else (low, middle)
    return (low + high) / 2
