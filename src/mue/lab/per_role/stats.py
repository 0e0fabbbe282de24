"""Differences between runs of one seed: effects of a design, paired intervals, and a test that may look more than once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mue.util.statistics import student_quantile

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gain:
    """How much lower a loss is, in nats: the mean over seeds and its interval. ``low > 0``: lower beyond doubt."""

    mean: float
    low: float
    high: float
    seeds: int

    def to_dict(self) -> dict[str, float | int | None]:
        def finite(x: float) -> float | None:
            return x if math.isfinite(x) else None

        return {"gain": finite(self.mean), "low": finite(self.low), "high": finite(self.high), "seeds": self.seeds}

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} … {self.high:+.4f}, {self.seeds} seeds)"


def paired(before: Sequence[float], after: Sequence[float], error: float) -> Gain:
    """What ``after`` gains on ``before``: Student's interval of the differences, seed by seed.

    Paired, since runs of one seed err together: their difference has less noise than either.

    Args:
        before, after: losses of the same seeds in the same order; one that diverged (inf) makes the gain -inf.
        error: chance of missing, half of it at each side.
    """
    differences = np.asarray(before, dtype=float) - np.asarray(after, dtype=float)
    n = len(differences)
    if not np.isfinite(differences).all():
        return Gain(-math.inf, -math.inf, -math.inf, n)
    mean = float(differences.mean())
    half = math.inf if n < 2 else student_quantile(1 - error / 2, n - 1) * float(differences.std(ddof=1)) / math.sqrt(n)
    return Gain(mean, mean - half, mean + half, n)


def slopes(signs: npt.NDArray[np.int64], plus: Sequence[float], minus: Sequence[float]) -> Array:
    """Change of the loss from the centre to +1 of each coordinate, from a mirrored design.

    Args:
        signs: (pairs, coordinates). plus, minus: losses of each row and of its mirror image, in nats.

    Returns:
        (coordinates,), in nats.

    A run that diverged counts as the largest finite difference. A finite one is pulled in only where no slopes at all could
    have made it: with n orthogonal rows and k coordinates it is at most √(k(n-1)/(n-k)) times the others' root mean square.
    """
    n, k = signs.shape
    with np.errstate(invalid="ignore"):  # inf - inf
        half = (np.asarray(plus, dtype=float) - np.asarray(minus, dtype=float)) / 2
    known = np.abs(half[np.isfinite(half)])
    edge = float(known.max()) if known.size else 0.0
    half = np.nan_to_num(half, nan=0.0, posinf=edge, neginf=-edge)
    if n > k:
        # Each row of an orthogonal design has the leverage k/n, so what the slopes explain of its square is at most
        # that share of the sum of squares. A limit at 7.4 medians also changed 0.6 % of clean designs (docs/LOG.md,
        # "Per-role tuning").
        others = np.sqrt(np.maximum((half @ half) - half**2, 0.0) / (n - 1))
        reach = (1 + 1e-9) * math.sqrt(k * (n - 1) / (n - k)) * others
        half = np.clip(half, -reach, reach)
    return np.asarray(signs.T @ half / len(half))


def noise_of(effects: Array, kinds: Sequence[str]) -> float:
    """Standard error of an effect, from the effects themselves: most are noise (Lenth, Technometrics 31, 1989).

    What all effects of one kind share is taken out first, or a learning rate that is wrong for every role would pass for noise.

    Args:
        effects: in nats. kinds: of each, which number it multiplies.
    """
    rest = np.array(effects, dtype=float)
    for kind in set(kinds):
        of_kind = np.asarray([k == kind for k in kinds])
        if of_kind.sum() > 4:  # of fewer the median is mostly those effects themselves
            rest[of_kind] -= np.median(rest[of_kind])
    size = np.abs(rest)
    # Lenth's pseudo standard error: 1.5 medians of |x| are a normal's standard deviation; once more without what is
    # more than 2.5 of them away.
    first = 1.5 * float(np.median(size))
    kept = size[size < 2.5 * first]
    return 1.5 * float(np.median(kept)) if kept.size else first


def shrunk(effects: Array, noise: float) -> Array:
    """Effects with the noise taken out: 0 below one standard error, the closer to themselves the larger.

    Of the form of the non-negative garrote (Breiman, Technometrics 37, 1995), which for an orthogonal design is this.
    """
    size = np.maximum(np.abs(effects), max(noise, 1e-300))
    return np.asarray(effects * (1 - (noise / size) ** 2))


def shares(signs: npt.NDArray[np.int64], plus: Sequence[float], minus: Sequence[float], error: float) -> list[Gain]:
    """What each multiplier of a set bought: mean over the others on and off, with simultaneous intervals.

    Runs pair a subset (+1: on) with its complement under one seed. The shares add up to the whole set's gain but for
    products of three. Spread is taken to be the same for all subsets, from what the shares leave unexplained.

    Args:
        signs: (pairs, multipliers). plus, minus: losses of each row's subset and of its complement, in nats.
        error: chance that any of the intervals misses.
    """
    differences = np.asarray(minus, dtype=float) - np.asarray(plus, dtype=float)
    n, k = signs.shape
    if not np.isfinite(differences).all():
        return [Gain(math.nan, -math.inf, math.inf, n)] * k
    gains = signs.T @ differences / n
    spread = float(np.linalg.norm(differences - signs @ gains)) / math.sqrt(n - k)
    half = student_quantile(1 - error / (2 * k), n - k) * spread / math.sqrt(n)
    return [Gain(float(g), float(g - half), float(g + half), n) for g in gains]
