"""Where the loss is lowest over log2(lr), how sure that is, and when a sweep cannot say.

    valley = fit_valley([Point(-9, 2.31, seed=0), Point(-8, 2.27, seed=0), ...])
    valley.minimum, valley.interval          # log2(lr)
    print(valley.verdict)                    # "minimum at lr = 3.1e-3 (2^-8.33), 95 % interval 2^-8.6 .. 2^-8.1"

The fit is local and Bayesian: a parabola through the points around the lowest one plus a smooth deviation from it, a
power series whose prior lets the walls steepen by a factor e within 1/c octaves, c from 1/4 to 2. Noise and c are
integrated over a grid instead of chosen: in simulated valleys with one steep wall, choosing between parabola and cubic
(AICc) gave 95 % intervals that missed the truth in 5 to 100 % of sweeps. The interval is where the sign of the slope is not settled, Fieller's idea
(J. R. Stat. Soc. B 16, 1954): it stays honest when the curvature is hardly known; it is then unbounded, and says so.

Losses of the same seed are treated as independent between learning rates; a common offset per seed makes the interval
too wide rather than too narrow, as long as every seed ran on the same learning rates.

Measured limits: 95 % intervals covered 81-96 % for a wall growing by e^2 per octave, and 24-93 % (the worst with the
least noise) where the curvature itself jumps at the minimum. On a grid of whole octaves no local fit sees such detail.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

__all__ = ["Point", "Valley", "fit_valley", "regret"]

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# A window of the sweep is fitted, never the far walls: at least this many learning rates, where there are so many ...
_FEWEST = 5
# ... and none whose loss lies higher above the lowest than this many times the median rise of those five.
_HIGHEST = 3.0
_DEGREE = 8  # of the power series: enough for walls of c = 1 within +-2 octaves; steeper ones are cut short
_STEEPENING = (0.25, 0.5, 1.0, 2.0)  # c, per octave
_WIDE = 2.0  # prior standard deviation of a term over that of exp(c x)
_NOISE = np.geomspace(1e-3, 1.0, 41)  # of one run, as a share of the spread of losses in the window
_OUTLIER = 0.01  # chance that any clean run is called an outlier


@dataclass(frozen=True)
class Point:
    """One finished run: log2 of its learning rate, its loss (NaN or inf: it diverged), its seed."""

    log2_lr: float
    loss: float
    seed: int = 0


@dataclass(frozen=True)
class Valley:
    """A fitted loss valley. Positions are log2(lr); losses are in the units that came in.

    ``interval`` has -inf or inf at a side on which the sweep puts no bound. ``used`` are the points of the fit,
    ``diverged`` counts the runs that have no loss. ``coefficients`` are those of a polynomial in (log2 lr - centre),
    lowest power first; empty where nothing could be fitted, and then ``curvature`` and ``noise`` may be NaN.
    """

    minimum: float
    interval: tuple[float, float]
    loss_at_minimum: float
    curvature: float
    """Second derivative of the loss by log2(lr) at the minimum."""
    noise: float
    """Standard deviation of one run's loss about the curve."""
    coefficients: tuple[float, ...]
    centre: float
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
        if not self.coefficients:
            raise ValueError(f"no curve was fitted: {self.verdict}")
        inside = min(max(log2_lr, self.used[0].log2_lr), self.used[-1].log2_lr)
        curve = np.polynomial.Polynomial(self.coefficients)
        at = inside - self.centre
        return float(curve(at) + (log2_lr - inside) * curve.deriv()(at))


def regret(valley: Valley, log2_lr: float) -> float:
    """Loss given away by training at this learning rate and not at the minimum. ValueError if nothing was fitted."""
    return valley.predict(log2_lr) - valley.loss_at_minimum


def fit_valley(points: Iterable[Point], *, confidence: float = 0.95, noise: float | None = None) -> Valley:
    """Fit the valley of a sweep.

    points: in any order; several seeds per learning rate are welcome and give the noise directly.
    noise: standard deviation of a loss between seeds if it is known from elsewhere; otherwise it is estimated from the
        residuals and the replicates, and the interval is as wide as so small a sample demands.

    Fewer than three learning rates with a loss give a Valley without a curve that says what is missing. Raises
    ValueError where every run diverged, and for a confidence or noise out of range.
    """
    everything = sorted(points, key=lambda p: (p.log2_lr, p.seed, p.loss))
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise ValueError(f"noise must be positive and finite, not {noise}")
    if not all(math.isfinite(p.log2_lr) for p in everything):
        raise ValueError("a learning rate is zero, negative or not finite: log2(lr) must be finite")
    usable = [p for p in everything if math.isfinite(p.loss)]
    if not usable:
        raise ValueError(f"no run has a finite loss ({len(everything)} diverged): sweep smaller learning rates")

    sweep = _Sweep.of(usable)
    tried = (everything[0].log2_lr, everything[-1].log2_lr)
    diverged = len(everything) - len(usable)
    flat = all(p.loss == usable[0].loss for p in usable)
    if len(sweep.x) < 3 or flat:
        n = len(sweep.x)
        why = f"{n} learning rate{'s' * (n > 1)} with a finite loss, a valley needs at least 3"
        why = "every loss is the same, so no learning rate is better" if flat and n >= 3 else why
        return _without_curve(sweep, usable, diverged, tried, why)

    warning, near = _second_valley(sweep, noise if noise is not None else sweep.pure_error)
    fit = _fit(near, noise)
    minimum = fit.minimum()
    interval = fit.interval(confidence, minimum)
    edge = _edge((minimum, float(sweep.x[sweep.best])), tried)
    low, high = fit.window
    return Valley(
        minimum=minimum,
        interval=interval,
        loss_at_minimum=float(fit.curve(minimum - fit.centre)),
        curvature=float(fit.curve.deriv(2)(minimum - fit.centre)),
        noise=fit.noise,
        coefficients=tuple(float(c) for c in fit.curve.coef),
        centre=fit.centre,
        used=tuple(p for p in usable if low <= p.log2_lr <= high),
        diverged=diverged,
        edge=edge,
        warning=warning or _second_valley(sweep, fit.noise)[0],
        verdict=_verdict(minimum, interval, confidence, edge),
    )


# ------------------------------------------------------------------------------------------------------------- the fit


@dataclass(frozen=True)
class _Sweep:
    """Finite losses by distinct learning rate: positions x ascending, and the losses at each."""

    x: Array
    losses: tuple[Array, ...]

    @classmethod
    def of(cls, points: list[Point]) -> _Sweep:
        x = sorted({p.log2_lr for p in points})
        return cls(np.array(x), tuple(np.array([p.loss for p in points if p.log2_lr == at]) for at in x))

    @property
    def mean(self) -> Array:
        # The median of replicates where it means anything: one bad seed must not move the window.
        return np.array([np.median(values) if len(values) > 2 else values.mean() for values in self.losses])

    @property
    def pure_error(self) -> float:
        """Noise as the replicates show it, whatever the curve; NaN where each learning rate ran once."""
        freedom = sum(len(v) - 1 for v in self.losses)
        return math.sqrt(sum(float(v.var() * len(v)) for v in self.losses) / freedom) if freedom else math.nan

    @property
    def best(self) -> int:
        return int(np.argmin(self.mean))


@dataclass(frozen=True)
class _Posterior:
    """What is believed about the power series at each node g = (noise, c) of the grid, in units of u and of spread."""

    weight: Array  # G
    mean: Array  # G, K
    covariance: Array  # G, K, K
    noise: Array  # G
    clear: Mask  # N; False: the run is an outlier given all others


@dataclass(frozen=True)
class _Fit:
    posterior: _Posterior
    curve: np.polynomial.Polynomial  # posterior mean, in x - centre and losses
    noise: float
    noise_known: bool
    centre: float
    scale: float
    window: tuple[float, float]
    step: float  # the widest gap in the window's grid

    def minimum(self) -> float:
        """Where the mean curve is lowest within the window: beyond it the curve is a guess."""
        low, high = self.window
        x = np.linspace(low, high, 801)
        i = int(np.argmin(self.curve(x - self.centre)))
        slope = self.curve.deriv()
        if slope(x[0] - self.centre) >= 0 and i == 0:
            return low
        if slope(x[-1] - self.centre) <= 0 and i == len(x) - 1:
            return high
        left, right = float(x[max(0, i - 1)]), float(x[min(len(x) - 1, i + 1)])
        for _ in range(60):
            middle = (left + right) / 2
            left, right = (middle, right) if slope(middle - self.centre) < 0 else (left, middle)
        return (left + right) / 2

    def interval(self, confidence: float, minimum: float) -> tuple[float, float]:
        """Outwards from the minimum to where the curve surely rises, looking one grid step beyond the window.

        A side that is not settled by then has no bound: out there nothing was measured.
        """
        sure = 0.5 + confidence / 2

        def end(limit: float) -> float:
            outward = math.copysign(1.0, limit - minimum)
            near, far = minimum, limit
            for _ in range(3):  # a mesh, then twice a finer one between the two places that bracket the end
                x = np.linspace(near, far, 41)
                rising = self._probability_of_rise(x, outward) >= sure
                if not self.noise_known or not rising.any():
                    return outward * math.inf
                i = int(np.argmax(rising))
                near, far = float(x[max(0, i - 1)]), float(x[i])
            return far

        return end(self.window[0] - self.step), end(self.window[1] + self.step)

    def _probability_of_rise(self, x_X: Array, outward: float) -> Array:
        power_K = np.arange(_DEGREE + 1)
        u_X = (x_X - self.centre) / self.scale
        slope_XK = power_K * u_X[:, None] ** np.maximum(power_K - 1, 0)
        mean_GX = self.posterior.mean @ slope_XK.T
        variance_GX = ((slope_XK @ self.posterior.covariance) * slope_XK).sum(-1)
        chance_GX = _normal_cdf(outward * mean_GX / np.sqrt(np.maximum(variance_GX, 1e-300)))
        return np.asarray(self.posterior.weight @ chance_GX)


def _fit(sweep: _Sweep, noise: float | None) -> _Fit:
    first, last = _window(sweep)
    grid = sweep.x[first : last + 1]
    x = np.repeat(grid, [len(v) for v in sweep.losses[first : last + 1]])
    y = np.concatenate(sweep.losses[first : last + 1])
    centre = float(sweep.x[sweep.best])
    scale = float(np.abs(grid - centre).max())
    level, spread = float(y.mean()), float(np.ptp(y)) or 1.0
    noises = _NOISE if noise is None else np.array([noise / spread])

    weight_N = np.ones(len(x))
    for _ in range(10):  # each round sets aside what the last one found out of line
        posterior = _posterior((x - centre) / scale, (y - level) / spread, scale, noises, weight_N)
        if (posterior.clear | (weight_N < 1)).all():
            break
        weight_N = np.where(posterior.clear, weight_N, 0.01)
    coefficients = spread * (posterior.weight @ posterior.mean) / scale ** np.arange(_DEGREE + 1)
    coefficients[0] += level
    return _Fit(
        posterior=posterior,
        curve=np.polynomial.Polynomial(coefficients),
        noise=spread * math.exp(float(posterior.weight @ np.log(posterior.noise))),
        noise_known=noise is not None or len(x) > 3,
        centre=centre,
        scale=scale,
        window=(float(grid[0]), float(grid[-1])),
        step=float(np.diff(grid).max()),
    )


def _window(sweep: _Sweep) -> tuple[int, int]:
    """First and last index of the learning rates to fit: grown from the lowest, always towards the lower neighbour."""
    mean, n = sweep.mean, len(sweep.x)
    first, last = max(0, sweep.best - 1), min(n - 1, sweep.best + 1)
    cap = math.inf
    while first > 0 or last < n - 1:
        left = mean[first - 1] if first > 0 else math.inf
        right = mean[last + 1] if last < n - 1 else math.inf
        if last - first + 1 == _FEWEST:
            cap = _HIGHEST * float(np.median(np.delete(mean[first : last + 1], sweep.best - first) - mean[sweep.best]))
        if min(left, right) - mean[sweep.best] > cap:
            break
        first, last = (first - 1, last) if left <= right else (first, last + 1)
    return first, last


def _posterior(u_N: Array, y_N: Array, scale: float, noises: Array, weight_N: Array) -> _Posterior:
    """Condition the power series sum_k b_k u^k on losses y, at every (noise, c) at once.

    b_0..b_2 have a flat prior; b_k has standard deviation a (c scale)^(k-2) 2/k!, which is how the terms of
    a u^2 -> exp(c x) fall, a being the parabola's own coefficient. Nodes are weighted by the marginal likelihood, with
    a flat prior over log noise and over c.
    """
    power_K = np.arange(_DEGREE + 1)
    parabola = np.linalg.lstsq(u_N[:, None] ** power_K[:3] * weight_N[:, None], y_N * weight_N, rcond=None)[0]
    a = max(abs(float(parabola[2])), 1e-6)
    factorial_K = np.array([math.factorial(k) for k in power_K])
    noise_G, c_G = (g.ravel() for g in np.meshgrid(noises, np.array(_STEEPENING), indexing="ij"))
    free_K = power_K < 3
    size_GK = np.where(free_K, 1.0, a * (c_G[:, None] * scale) ** np.maximum(power_K - 2, 0) * _WIDE * 2 / factorial_K)

    basis_GNK = u_N[:, None] ** power_K * size_GK[:, None, :]
    precision_GN = weight_N / noise_G[:, None] ** 2
    weighted_GKN = (basis_GNK * precision_GN[:, :, None]).swapaxes(1, 2)
    A_GKK = weighted_GKN @ basis_GNK + np.diag(np.where(free_K, 0.0, 1.0))
    covariance_GKK = np.linalg.inv(A_GKK)
    b_GK = weighted_GKN @ y_N
    mean_GK = np.einsum("gkl,gl->gk", covariance_GKK, b_GK)
    quadratic_G = precision_GN @ y_N**2 - np.einsum("gk,gk->g", b_GK, mean_GK)
    evidence_G = -0.5 * (quadratic_G + np.linalg.slogdet(A_GKK)[1] - np.log(precision_GN).sum(1))
    weight_G = np.exp(evidence_G - evidence_G.max())
    weight_G /= weight_G.sum()

    g = int(np.argmax(evidence_G))
    projector_NN = np.diag(precision_GN[g]) - weighted_GKN[g].T @ covariance_GKK[g] @ weighted_GKN[g]
    keep = weight_G > 1e-5
    return _Posterior(
        weight_G[keep] / weight_G[keep].sum(),
        (mean_GK * size_GK)[keep],
        (covariance_GKK * size_GK[:, :, None] * size_GK[:, None, :])[keep],
        noise_G[keep],
        _clear(projector_NN, y_N, known=len(noises) == 1),
    )


def _clear(projector_NN: Array, y_N: Array, known: bool) -> Mask:
    """Which runs agree with what all the others say about them: leave-one-out residuals against their own spread."""
    n = len(y_N)
    freedom = n - 3 - 1
    if freedom < 3:
        return np.ones(n, dtype=bool)  # too few to call one of them bad
    out_N = projector_NN @ y_N
    own_N = np.maximum(np.diag(projector_NN), 1e-300)
    total = float(y_N @ out_N)
    others_N = np.ones(n) if known else np.maximum((total - out_N**2 / own_N) / freedom, 1e-12)
    t_N = np.abs(out_N) / np.sqrt(own_N * others_N)
    return np.asarray(t_N < student_quantile(1 - _OUTLIER / (2 * n), math.inf if known else freedom))


def _normal_cdf(z: Array) -> Array:
    """The normal law's distribution function to 1e-7 (Abramowitz & Stegun 26.2.17); numpy has none."""
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


# ------------------------------------------------------------------------------------------------------------- in words


def _edge(places: tuple[float, ...], tried: tuple[float, float]) -> str | None:
    if min(places) <= tried[0]:
        return "low"
    return "high" if max(places) >= tried[1] else None


def _second_valley(sweep: _Sweep, noise: float) -> tuple[str | None, _Sweep]:
    """Another low place behind a barrier that noise does not explain, and the sweep on the near side of barriers."""
    mean, best = sweep.mean, sweep.best
    error = noise / np.sqrt([len(v) for v in sweep.losses])
    warning, first, last = None, 0, len(mean) - 1
    for i in range(len(mean)):
        between = range(min(i, best) + 1, max(i, best))
        top = max(between, key=lambda k: mean[k], default=i)
        if mean[top] - mean[i] > 5 * math.hypot(error[top], error[i]):  # never where the noise is unknown (NaN)
            first, last = (max(first, top), last) if top < best else (first, min(last, top))
            warning = (
                f"a second valley near {_lr(float(sweep.x[i]))}, behind a rise at {_lr(float(sweep.x[top]))}: a run"
                " that went wrong, or two minima; more seeds there tell which"
            )
    near = _Sweep(sweep.x[first : last + 1], sweep.losses[first : last + 1])
    return warning, near if len(near.x) >= 3 else sweep


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


def _without_curve(sweep: _Sweep, usable: list[Point], diverged: int, tried: tuple[float, float], why: str) -> Valley:
    best = float(sweep.x[sweep.best])
    return Valley(
        minimum=best,
        interval=(-math.inf, math.inf),
        loss_at_minimum=float(sweep.mean[sweep.best]),
        curvature=math.nan,
        noise=math.nan,
        coefficients=(),
        centre=best,
        used=tuple(usable),
        diverged=diverged,
        edge=_edge((best,), tried),
        warning=None,
        verdict=f"undetermined: {why}",
    )
