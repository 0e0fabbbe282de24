"""What is assumed of every valley before its losses are seen: how its curvature varies, and which noise its runs have.

The constants are what fifteen recorded sweeps of the lab showed, as those of the fit (``mue.lab.valley.posterior``).
Places are octaves from a centre near the minimum. Legend: N, M runs or places, K basis functions.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Half as much change, and within half an octave, made a search's intervals narrower, which then covered 90.8 %, and a
# grid's wider (docs/LOG.md, "A sweep's layouts once more").
_LENGTH = 1.0  # octaves over which the curvature changes ...
_KNOTS = 0.5  # ... linearly between places so far apart
_LOCAL = 0.9  # octaves over which the local part of a seed's noise changes
_EVERYWHERE = 1 / 8  # of the variance that a seed shares between learning rates
_GROWS = 2.0  # a run's own noise grows up to so many octaves from the centre


def basis(d_N: Array, low: float, high: float) -> Array:
    """N, K: 1, d, and the double integral from d = 0 of a random curvature of variance 1, a function for each of its parts.

    The curvature is linear between knots half an octave apart, and its values there have an exponential covariance.

    Args:
        d_N: octaves from the centre. low, high: where the knots begin and end.
    """
    knots_K = np.linspace(low, high, math.ceil((high - low) / _KNOTS) + 1)
    step = knots_K[1] - knots_K[0]

    def integral(x: Array, times: int) -> Array:  # of hats, one on each knot
        power = 1 + times
        ramps = [np.maximum(x[:, None] - knots_K + k * step, 0) ** power for k in (1, 0, -1)]
        return np.asarray((ramps[0] - 2 * ramps[1] + ramps[2]) / (step * math.factorial(power)))

    start = np.zeros(1)
    hats_NK = integral(d_N, 2) - integral(start, 2) - d_N[:, None] * integral(start, 1)
    covariance_KK = np.exp(-np.abs(knots_K[:, None] - knots_K) / _LENGTH)
    # By its root, independent weights of variance 1 have that covariance.
    parts_NK = hats_NK @ np.linalg.cholesky(covariance_KK)
    return np.concatenate([np.ones((len(d_N), 1)), d_N[:, None], parts_NK], axis=1)


def own_noise(d: Array, growth: Array | float) -> Array:
    """Variance of a run's own noise, 1 at the centre.

    Args:
        d: octaves from the centre. growth: octaves of standard deviation per octave, hence the 4 for a variance.
    """
    return np.asarray(4.0 ** (growth * np.clip(d, -_GROWS, _GROWS)))


def shared_noise(a_N: Array, b_M: Array, seed_N: Array, seed_M: Array) -> Array:
    """N, M: covariance of what runs share by their seeds, of variance 1.

    Args:
        a_N, b_M: octaves from the centre. seed_N, seed_M: only runs of one seed share anything.
    """
    local = np.exp(-0.5 * ((a_N[:, None] - b_M) / _LOCAL) ** 2)
    return np.asarray((seed_N[:, None] == seed_M) * (_EVERYWHERE + (1 - _EVERYWHERE) * local))
