"""Which runs of a sweep a valley is fitted to: those around the lowest, not the far walls, nor what a rise sets apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mue.lab.valley.posterior import Limits, Posterior, fit_posterior
from mue.lab.valley.prior import own_noise

Array = npt.NDArray[np.float64]

# A window of the sweep is fitted, never the far walls, where a curvature that varies over an octave describes nothing:
# learning rates within so many octaves of the lowest (chosen on the fifteen sweeps, with the other constants of the
# fit) ...
REACH = 4.0
_ROUNDING = 0.05  # octaves more: lr = 0.0078 for 2^-7 put a run at 4.002 octaves, out of reach (docs/LOG.md)
# ... up to the first whose rise over distance squared is so many times the median's, and always the lowest's neighbours.
_STEEP = 30.0
# A rise between two low places is a barrier from so many standard deviations on, of noise that grows so with lr.
_BARRIER, _GROWTH = 4.0, 0.7  # the growth is the posterior's
_MARGIN = 1.0  # octaves beyond the outermost run in which a minimum is still looked for


@dataclass(frozen=True)
class LossPoint:
    """One finished run: log2 of its learning rate, its loss (NaN or inf: it diverged or was stopped), its seed."""

    log2_lr: float
    loss: float
    seed: int = 0


def lr_text(log2_lr: float) -> str:
    """``lr = 0.0031 (2^-8.33)``."""
    return f"lr = {2.0**log2_lr:.2g} (2^{log2_lr:.2f})"


@dataclass(frozen=True)
class SecondValley:
    """Another low place, and the rise before it, as log2(lr)."""

    at: float
    rise: float

    def __str__(self) -> str:
        return (
            f"a second valley near {lr_text(self.at)}, behind a rise at {lr_text(self.rise)}: a run that went wrong, or two"
            " minima; more seeds there tell which"
        )


@dataclass(frozen=True)
class Runs:
    """Finished runs by distinct learning rate, and what is beyond them.

    Attributes:
        x: log2 of the learning rates with a loss, ascending. at: the runs at each of them.
        walls: log2 of the learning rates at which no run has a loss: high, nobody knows how high. tried: the ends of
            all learning rates.
        diverged: how many runs have no loss.
    """

    x: Array
    at: tuple[tuple[LossPoint, ...], ...]
    walls: tuple[float, ...]
    tried: tuple[float, float]
    diverged: int

    @classmethod
    def of(cls, points: Iterable[LossPoint]) -> Runs:
        """Raises ValueError where no run has a loss."""
        everything = sorted(points, key=lambda p: (p.log2_lr, p.seed, p.loss))
        if not all(math.isfinite(p.log2_lr) for p in everything):
            raise ValueError("a learning rate is zero, negative or not finite: log2(lr) must be finite")
        usable = [p for p in everything if math.isfinite(p.loss)]
        if not usable:
            raise ValueError(f"no run has a finite loss ({len(everything)} diverged): sweep smaller learning rates")
        x = sorted({p.log2_lr for p in usable})
        walls = tuple(sorted({p.log2_lr for p in everything if not math.isfinite(p.loss)} - set(x)))
        return cls(
            np.array(x),
            tuple(tuple(p for p in usable if p.log2_lr == at) for at in x),
            walls,
            (everything[0].log2_lr, everything[-1].log2_lr),
            len(everything) - len(usable),
        )

    @cached_property
    def mean(self) -> Array:
        """The loss at each learning rate, over its seeds."""
        # The median of replicates where it means anything: one bad seed must not move the window.
        losses = [np.array([p.loss for p in runs]) for runs in self.at]
        return np.array([np.median(values) if len(values) > 2 else values.mean() for values in losses])

    @cached_property
    def best(self) -> int:
        """Index of the learning rate with the lowest loss."""
        return int(np.argmin(self.mean))

    @property
    def too_few(self) -> str | None:
        """Why no curve can be fitted."""
        n, losses = len(self.x), {p.loss for runs in self.at for p in runs}
        if n < 3:
            tried = "; all above diverged: add smaller ones" if min(self.walls, default=-math.inf) > self.x[-1] else ""
            return f"{n} learning rate{'s' * (n > 1)} with a finite loss, a valley needs at least 3{tried}"
        return "every loss is the same, so no learning rate is better" if len(losses) == 1 else None

    @property
    def pure_error(self) -> float:
        """The replicates' pooled standard deviation, the noise whatever the curve; NaN where each lr ran once."""
        losses = [np.array([p.loss for p in runs]) for runs in self.at]
        freedom = sum(len(v) - 1 for v in losses)
        return math.sqrt(sum(float(v.var() * len(v)) for v in losses) / freedom) if freedom else math.nan

    def edge(self, minimum: float) -> str | None:
        """The end of the grid at which the fitted minimum or the lowest run lies; of one or two learning rates every one is an end."""
        low, high = self.tried
        if len({*self.x, *self.walls}) < 3:
            return None
        places = minimum, float(self.x[self.best])
        if min(places) <= low:
            return "low"
        return "high" if max(places) >= high else None

    def fit_posterior(self, noise: float | None = None) -> tuple[Posterior, tuple[LossPoint, ...], SecondValley | None]:
        """Fit the window around the lowest learning rate.

        Args:
            noise: standard deviation of a loss between seeds, where it is known.

        Returns:
            The posterior, the window's runs, and a second valley if there is one.
        """
        # Once with the noise that replicates show, to fit one valley only, and once with the fitted noise, which single
        # runs have as well.
        first, last, second = self._near_side(noise if noise is not None else self.pure_error)
        first, last = self._window(first, last)
        used = tuple(p for runs in self.at[first : last + 1] for p in runs)
        x, y = np.array([p.log2_lr for p in used]), np.array([p.loss for p in used])
        centre = float(self.x[self.best])
        posterior = fit_posterior(x, y, np.array([p.seed for p in used]), centre, self._limits(first, last), noise)
        return posterior, used, second or self._near_side(posterior.noise)[2]

    def _window(self, first: int, last: int) -> tuple[int, int]:
        """First and last index of the learning rates to fit, of those from ``first`` to ``last``."""
        distance, rise, best = np.abs(self.x - self.x[self.best]), self.mean - self.mean[self.best], self.best
        near = (distance <= REACH + _ROUNDING) & (np.arange(len(rise)) >= first) & (np.arange(len(rise)) <= last)
        steepness = rise / np.maximum(distance, 1.0) ** 2  # within an octave noise alone would make it large
        cap = _STEEP * float(np.median(steepness[near & (distance > 0)])) if near.sum() > 1 else math.inf
        fits = near & (steepness <= cap)
        left, right = max(first, best - 1), min(last, best + 1)
        while left > first and fits[left - 1]:
            left -= 1
        while right < last and fits[right + 1]:
            right += 1
        return (left, right) if right - left >= 2 else (max(first, right - 2), min(last, left + 2))

    def _limits(self, first: int, last: int) -> Limits:
        """Where the minimum may lie: up to what is known to be high, else a margin beyond the window."""
        low, high = float(self.x[first]), float(self.x[last])
        below = [x for x in (*self.walls, *self.x[:first].tolist()) if x < low]
        above = [x for x in (*self.walls, *self.x[last + 1 :].tolist()) if x > high]
        bottom, top = max(below, default=-math.inf), min(above, default=math.inf)
        return Limits(
            max(low - _MARGIN, bottom), min(high + _MARGIN, top), bottom < low - _MARGIN, top > high + _MARGIN
        )

    def _near_side(self, noise: float) -> tuple[int, int, SecondValley | None]:
        """First and last learning rate on this side of barriers that noise does not explain, and what lies behind them."""
        mean, best = self.mean, self.best
        error = noise * np.sqrt(own_noise(self.x - self.x[best], _GROWTH) / [len(runs) for runs in self.at])
        second, first, last = None, 0, len(mean) - 1
        for i in range(len(mean)):
            between = range(min(i, best) + 1, max(i, best))
            top = max(between, key=lambda k: mean[k], default=i)
            if mean[top] - mean[i] > _BARRIER * math.hypot(
                error[top], error[i]
            ):  # never where the noise is unknown (NaN)
                first, last = (max(first, top), last) if top < best else (first, min(last, top))
                second = SecondValley(float(self.x[i]), float(self.x[top]))
        return (first, last, second) if last - first >= 2 else (0, len(mean) - 1, second)
