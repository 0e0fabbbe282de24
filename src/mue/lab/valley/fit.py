"""Where the loss is lowest over log2(lr), how sure that is, and when a sweep cannot say.

    valley = fit_valley([Point(-9, 2.31, seed=0), Point(-8, 2.27, seed=0), ...])
    valley.minimum, valley.interval          # log2(lr)
    print(valley.verdict)                    # "minimum at lr = 3.1e-3 (2^-8.33), 95 % interval 2^-8.6 .. 2^-8.1"

The fit is local and Bayesian (``mue.lab.valley.posterior``): curves with one minimum whose curvature varies, noise that grows with
the learning rate, and noise that runs of one seed share. The interval is the middle of the minima of the curves that the
losses leave possible; where these reach beyond everything that was tried it is unbounded, and says so.

Measured coverage and its limits: ``docs/results/valley_search.json`` and ``tests/test_valley.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mue.lab.valley.posterior import Belief, Limits, believe, own_noise

__all__ = ["REACH", "Point", "Second", "Valley", "fit_valley", "regret", "study"]

Array = npt.NDArray[np.float64]

# A window of the sweep is fitted, never the far walls: learning rates within so many octaves of the lowest ...
REACH = 4.0
_ROUNDING = 0.05  # octaves more, so that 0.0078 and 0.0078125 see the same runs
# ... up to the first whose rise over distance squared is so many times the median's, and always the lowest's neighbours.
_STEEP = 30.0
# A rise between two low places is a barrier from so many standard deviations on, of noise that grows so with lr.
_BARRIER, _GROWTH = 4.0, 0.7
_MARGIN = 1.0  # octaves beyond the outermost run in which a minimum is still looked for


@dataclass(frozen=True)
class Point:
    """One finished run: log2 of its learning rate, its loss (NaN or inf: it diverged or was stopped), its seed."""

    log2_lr: float
    loss: float
    seed: int = 0


@dataclass(frozen=True)
class Valley:
    """A fitted loss valley. Positions are log2(lr); losses are in the units that came in.

    ``interval`` has -inf or inf at a side on which the sweep puts no bound. ``used`` are the points of the fit,
    ``diverged`` counts the runs that have no loss. ``curve`` is a line of (log2 lr, loss) from the lowest to the highest
    learning rate used; empty where nothing could be fitted, and then ``curvature`` and ``noise`` are NaN.
    """

    minimum: float
    interval: tuple[float, float]
    loss_at_minimum: float
    curvature: float
    """Second derivative of the loss by log2(lr) at the minimum."""
    noise: float
    """Standard deviation of one run's loss about the curve, near the minimum."""
    curve: tuple[tuple[float, float], ...]
    used: tuple[Point, ...]
    diverged: int
    edge: str | None
    """"low" or "high" where the best learning rate is at that end of the grid, else None."""
    warning: str | None
    """Something odd that the numbers do not show, such as a second valley."""
    verdict: str

    @property
    def determined(self) -> bool:
        """The minimum is bracketed on both sides and not at the edge of the grid."""
        return self.edge is None and all(math.isfinite(end) for end in self.interval)

    def predict(self, log2_lr: float) -> float:
        """The fitted loss at a learning rate. Raises ValueError where nothing could be fitted.

        Outside the points used the curve goes on along its tangent, which in a valley errs on the low side.
        """
        if not self.curve:
            raise ValueError(f"no curve was fitted: {self.verdict}")
        x, y = np.array(self.curve).T
        inside = min(max(log2_lr, float(x[0])), float(x[-1]))
        end = 0 if log2_lr < inside else -2
        tangent = (y[end + 1] - y[end]) / (x[end + 1] - x[end])
        return float(np.interp(inside, x, y) + (log2_lr - inside) * tangent)


def regret(valley: Valley, log2_lr: float) -> float:
    """Loss given away by training at this learning rate and not at the minimum. ValueError if nothing was fitted."""
    return valley.predict(log2_lr) - valley.loss_at_minimum


def fit_valley(points: Iterable[Point], *, confidence: float = 0.95, noise: float | None = None) -> Valley:
    """Fit the valley of a sweep.

    points: in any order; several seeds per learning rate are welcome and give the noise directly.
    noise: standard deviation of a loss between seeds near the minimum if it is known from elsewhere; otherwise it is
        estimated with the curve, and the interval is as wide as so small a sample demands.

    Fewer than three learning rates with a loss give a Valley without a curve that says what is missing. Raises
    ValueError where every run diverged, and for a confidence or noise out of range.
    """
    return study(points, confidence=confidence, noise=noise)[0]


def study(
    points: Iterable[Point], *, confidence: float = 0.95, noise: float | None = None
) -> tuple[Valley, Belief | None, Second | None]:
    """As :func:`fit_valley`, with the posterior it rests on and a second valley if there is one."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise ValueError(f"noise must be positive and finite, not {noise}")
    sweep = _Sweep.of(points)
    why = sweep.too_little
    if why:
        return _without_curve(sweep, why), None, None
    belief, used, second = sweep.believe(noise)
    mesh, curve = belief.mesh, belief.curve
    first, last = used[0].log2_lr, used[-1].log2_lr
    inside = (mesh >= first) & (mesh <= last)
    lowest = int(np.argmin(np.where(inside, curve, np.inf))) if inside.any() else int(np.abs(mesh - first).argmin())
    minimum, loss, curvature = _bottom(mesh, curve, lowest)
    minimum = min(max(minimum, first), last)  # beyond, the curve is a guess
    drawn = np.unique([first, *mesh[inside], last])
    low, high = belief.interval(confidence) if noise is not None or len(used) > 3 else (-math.inf, math.inf)
    interval = (min(low, minimum), max(high, minimum))
    edge = sweep.edge(minimum)
    valley = Valley(
        minimum=minimum,
        interval=interval,
        loss_at_minimum=loss,
        curvature=curvature,
        noise=belief.noise,
        curve=tuple(zip(drawn.tolist(), np.interp(drawn, mesh, curve).tolist(), strict=True)),
        used=used,
        diverged=sweep.diverged,
        edge=edge,
        warning=str(second) if second else None,
        verdict=_verdict(minimum, interval, confidence, edge),
    )
    return valley, belief, second


def _bottom(mesh_M: Array, curve_M: Array, lowest: int) -> tuple[float, float, float]:
    """Place, value and curvature of the parabola through the lowest place of a curve and its neighbours."""
    i = min(max(lowest, 1), len(mesh_M) - 2)
    step = float(mesh_M[1] - mesh_M[0])
    left, here, right = (float(curve_M[i + k]) for k in (-1, 0, 1))
    slope, bend = (right - left) / 2, left - 2 * here + right
    if i != lowest or bend <= 0:
        return float(mesh_M[lowest]), float(curve_M[lowest]), bend / step**2
    shift = min(max(-slope / bend, -0.5), 0.5)
    return float(mesh_M[i]) + step * shift, here + slope * shift + bend * shift**2 / 2, bend / step**2


# ----------------------------------------------------------------------------------------------------------- the sweep


@dataclass(frozen=True)
class Second:
    """Another low place, and the rise before it, as log2(lr)."""

    at: float
    rise: float

    def __str__(self) -> str:
        return (
            f"a second valley near {_lr(self.at)}, behind a rise at {_lr(self.rise)}: a run that went wrong, or two"
            " minima; more seeds there tell which"
        )


@dataclass(frozen=True)
class _Sweep:
    """Finished runs by distinct learning rate, and what is beyond them.

    x: learning rates with a loss, ascending, and the runs at each. tried: the ends of all learning rates, those without a
    loss too. diverged: how many runs have none.
    """

    x: Array
    runs: tuple[tuple[Point, ...], ...]
    walls: tuple[float, ...]
    tried: tuple[float, float]
    diverged: int

    @classmethod
    def of(cls, points: Iterable[Point]) -> _Sweep:
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
        # The median of replicates where it means anything: one bad seed must not move the window.
        losses = [np.array([p.loss for p in runs]) for runs in self.runs]
        return np.array([np.median(values) if len(values) > 2 else values.mean() for values in losses])

    @cached_property
    def best(self) -> int:
        return int(np.argmin(self.mean))

    @property
    def too_little(self) -> str | None:
        """Why no curve can be fitted."""
        n, losses = len(self.x), {p.loss for runs in self.runs for p in runs}
        if n < 3:
            tried = "; all above diverged: add smaller ones" if min(self.walls, default=-math.inf) > self.x[-1] else ""
            return f"{n} learning rate{'s' * (n > 1)} with a finite loss, a valley needs at least 3{tried}"
        return "every loss is the same, so no learning rate is better" if len(losses) == 1 else None

    @property
    def pure_error(self) -> float:
        """Noise as the replicates show it, whatever the curve; NaN where each learning rate ran once."""
        losses = [np.array([p.loss for p in runs]) for runs in self.runs]
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

    def believe(self, noise: float | None = None) -> tuple[Belief, tuple[Point, ...], Second | None]:
        """The posterior of the window around the lowest learning rate, its runs, and a second valley if there is one."""
        first, last, second = self._near_side(noise if noise is not None else self.pure_error)
        first, last = self._window(first, last)
        used = tuple(p for runs in self.runs[first : last + 1] for p in runs)
        x, y = np.array([p.log2_lr for p in used]), np.array([p.loss for p in used])
        centre = float(self.x[self.best])
        belief = believe(x, y, np.array([p.seed for p in used]), centre, self._limits(first, last), noise)
        return belief, used, second or self._near_side(belief.noise)[2]

    def _window(self, first: int, last: int) -> tuple[int, int]:
        """First and last index of the learning rates to fit, of those from ``first`` to ``last``."""
        distance, rise, best = np.abs(self.x - self.x[self.best]), self.mean - self.mean[self.best], self.best
        near = (distance <= REACH + _ROUNDING) & (np.arange(len(rise)) >= first) & (np.arange(len(rise)) <= last)
        steepness = rise / np.maximum(distance, 1.0) ** 2
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

    def _near_side(self, noise: float) -> tuple[int, int, Second | None]:
        """First and last learning rate on this side of barriers that noise does not explain, and what lies behind them."""
        mean, best = self.mean, self.best
        error = noise * np.sqrt(own_noise(self.x - self.x[best], _GROWTH) / [len(runs) for runs in self.runs])
        second, first, last = None, 0, len(mean) - 1
        for i in range(len(mean)):
            between = range(min(i, best) + 1, max(i, best))
            top = max(between, key=lambda k: mean[k], default=i)
            if mean[top] - mean[i] > _BARRIER * math.hypot(
                error[top], error[i]
            ):  # never where the noise is unknown (NaN)
                first, last = (max(first, top), last) if top < best else (first, min(last, top))
                second = Second(float(self.x[i]), float(self.x[top]))
        return (first, last, second) if last - first >= 2 else (0, len(mean) - 1, second)


# ------------------------------------------------------------------------------------------------------------- in words


def _lr(log2_lr: float) -> str:
    return f"lr = {2.0**log2_lr:.2g} (2^{log2_lr:.2f})"


def _verdict(minimum: float, interval: tuple[float, float], confidence: float, edge: str | None) -> str:
    low, high = interval
    percent = f"{100 * confidence:g} %"
    if edge is not None:
        towards = "smaller" if edge == "low" else "larger"
        return f"the best lr is at the edge of the grid, {_lr(minimum)}: widen it towards {towards} lr"
    if math.isinf(low) and math.isinf(high):
        return f"undetermined: lowest near {_lr(minimum)}, but noise hides the valley; add seeds or widen the grid"
    if math.isinf(low) or math.isinf(high):
        side, bound = ("below", f"at most 2^{high:.1f}") if math.isinf(low) else ("above", f"at least 2^{low:.1f}")
        return f"minimum at {_lr(minimum)}, {percent} sure only of {bound}: add seeds or learning rates {side} it"
    return f"minimum at {_lr(minimum)}, {percent} interval 2^{low:.1f} .. 2^{high:.1f}"


def _without_curve(sweep: _Sweep, why: str) -> Valley:
    best = float(sweep.x[sweep.best])
    return Valley(
        minimum=best,
        interval=(-math.inf, math.inf),
        loss_at_minimum=float(sweep.mean[sweep.best]),
        curvature=math.nan,
        noise=math.nan,
        curve=(),
        used=tuple(p for runs in sweep.runs for p in runs),
        diverged=sweep.diverged,
        edge=sweep.edge(best),
        warning=None,
        verdict=f"undetermined: {why}",
    )
