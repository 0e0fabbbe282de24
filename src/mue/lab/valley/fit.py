"""Where the loss is lowest over log2(lr), how sure that is, and when a sweep cannot say.

    valley = fit_valley([LossPoint(-9, 2.31, seed=0), LossPoint(-8, 2.27, seed=0), ...])
    valley.minimum, valley.interval          # log2(lr)
    print(valley.verdict)                    # "minimum at lr = 3.1e-3 (2^-8.33), 95 % interval 2^-8.6 .. 2^-8.1"

The fit is local and Bayesian (``mue.lab.valley.posterior``): curves with one minimum whose curvature varies, noise that grows with
the learning rate, and noise that runs of one seed share. The interval is the middle of the minima of the curves that the
losses leave possible; where these reach beyond everything that was tried it is unbounded, and says so.

Measured coverage and its limits: ``docs/results/valley_search.json`` and ``tests/lab/valley/test_fit.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mue.lab.valley.posterior import Posterior
from mue.lab.valley.window import LossPoint, Runs, SecondValley, lr_text

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Valley:
    """A fitted loss valley. Positions are log2(lr); losses are in the units that came in.

    ``minimum`` is that of the mean curve, held between the outermost runs. ``interval`` has -inf or inf at a side on
    which the sweep puts no bound. ``used`` are the points of the fit, ``diverged`` counts the runs that have no loss.
    ``curve`` is a line of (log2 lr, loss) from the lowest to the highest learning rate used; empty where nothing could
    be fitted, and then ``curvature`` and ``noise`` are NaN.
    """

    minimum: float
    interval: tuple[float, float]
    loss_at_minimum: float
    curvature: float
    """Second derivative of the loss by log2(lr) at the minimum."""
    noise: float
    """Standard deviation of one run's loss about the curve, near the minimum."""
    curve: tuple[tuple[float, float], ...]
    used: tuple[LossPoint, ...]
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

        Args:
            log2_lr: inside or outside the points used. Outside the curve goes on along its tangent, which in a valley
                errs on the low side.
        """
        if not self.curve:
            raise ValueError(f"no curve was fitted: {self.verdict}")
        x, y = np.array(self.curve).T
        inside = min(max(log2_lr, float(x[0])), float(x[-1]))
        end = 0 if log2_lr < inside else -2
        tangent = (y[end + 1] - y[end]) / (x[end + 1] - x[end])
        return float(np.interp(inside, x, y) + (log2_lr - inside) * tangent)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: bounds that are infinite, and what is NaN, become null. The curve is left out: its points are its source."""

        def finite(x: float) -> float | None:
            return x if math.isfinite(x) else None

        return {
            "minimum_log2_lr": finite(self.minimum),
            "lr": 2.0**self.minimum if math.isfinite(self.minimum) else None,
            "interval_log2_lr": [finite(x) for x in self.interval],
            "loss": finite(self.loss_at_minimum),
            "curvature": finite(self.curvature),
            "noise": finite(self.noise),
            "edge": self.edge,
            "warning": self.warning,
            "verdict": self.verdict,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], points: Iterable[LossPoint]) -> Valley:
        """The valley that :meth:`to_dict` wrote.

        Its numbers and words are those that were stored; only the curve is fitted again, to be drawn.

        Args:
            points: the runs it was fitted to, which files keep beside it.
        """

        def number(stored: float | None, missing: float = math.nan) -> float:
            return missing if stored is None else stored

        low, high = data["interval_log2_lr"]
        return replace(
            fit_valley(points),
            minimum=number(data["minimum_log2_lr"]),
            interval=(number(low, -math.inf), number(high, math.inf)),
            loss_at_minimum=number(data["loss"]),
            curvature=number(data["curvature"]),
            noise=number(data["noise"]),
            edge=data["edge"],
            warning=data["warning"],
            verdict=data["verdict"],
        )


def fit_valley(points: Iterable[LossPoint], *, confidence: float = 0.95, noise: float | None = None) -> Valley:
    """Fit the valley of a sweep.

    Args:
        points: in any order; several seeds per learning rate are welcome and give the noise directly.
        confidence: of the interval.
        noise: standard deviation of a loss between seeds near the minimum if it is known from elsewhere; otherwise it is
            estimated with the curve, and the interval is as wide as so small a sample demands.

    Returns:
        The valley; of fewer than three learning rates with a loss one without a curve, whose verdict says what is missing.

    Raises:
        ValueError: every run diverged; a confidence or noise out of range.
    """
    return fit_with_posterior(points, confidence=confidence, noise=noise)[0]


def fit_with_posterior(
    points: Iterable[LossPoint], *, confidence: float = 0.95, noise: float | None = None
) -> tuple[Valley, Posterior | None, SecondValley | None]:
    """As :func:`fit_valley`, with what a search goes on from.

    Returns:
        The valley; the posterior it rests on, None where nothing could be fitted; a second valley if there is one.

    Raises:
        ValueError: as :func:`fit_valley`.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise ValueError(f"noise must be positive and finite, not {noise}")
    runs = Runs.of(points)
    if runs.too_few:
        return _without_curve(runs, runs.too_few), None, None
    posterior, used, second = runs.fit_posterior(noise)
    mesh, curve = posterior.mesh, posterior.curve
    first, last = used[0].log2_lr, used[-1].log2_lr
    inside = (mesh >= first) & (mesh <= last)
    lowest = int(np.argmin(np.where(inside, curve, np.inf))) if inside.any() else int(np.abs(mesh - first).argmin())
    minimum, loss, curvature = _bottom(mesh, curve, lowest)
    minimum = min(max(minimum, first), last)  # beyond, the curve is a guess
    drawn = np.unique([first, *mesh[inside], last])
    # Three runs determine a parabola and leave nothing to tell the noise by.
    low, high = posterior.interval(confidence) if noise is not None or len(used) > 3 else (-math.inf, math.inf)
    interval = (min(low, minimum), max(high, minimum))  # the mean curve's minimum need not be among the middle minima
    edge = runs.edge(minimum)
    valley = Valley(
        minimum=minimum,
        interval=interval,
        loss_at_minimum=loss,
        curvature=curvature,
        noise=posterior.noise,
        curve=tuple(zip(drawn.tolist(), np.interp(drawn, mesh, curve).tolist(), strict=True)),
        used=used,
        diverged=runs.diverged,
        edge=edge,
        warning=str(second) if second else None,
        verdict=_verdict(minimum, interval, confidence, edge),
    )
    return valley, posterior, second


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


def _verdict(minimum: float, interval: tuple[float, float], confidence: float, edge: str | None) -> str:
    """The valley in a sentence, with what to do where it does not say enough."""
    low, high = interval
    percent = f"{100 * confidence:g} %"
    if edge is not None:
        towards = "smaller" if edge == "low" else "larger"
        return f"the best lr is at the edge of the grid, {lr_text(minimum)}: widen it towards {towards} lr"
    if math.isinf(low) and math.isinf(high):
        return f"undetermined: lowest near {lr_text(minimum)}, but noise hides the valley; add seeds or widen the grid"
    if math.isinf(low) or math.isinf(high):
        side, bound = ("below", f"at most 2^{high:.1f}") if math.isinf(low) else ("above", f"at least 2^{low:.1f}")
        return f"minimum at {lr_text(minimum)}, {percent} sure only of {bound}: add seeds or learning rates {side} it"
    return f"minimum at {lr_text(minimum)}, {percent} interval 2^{low:.1f} .. 2^{high:.1f}"


def _without_curve(runs: Runs, why: str) -> Valley:
    """The lowest run in place of a minimum, and nothing that bounds it."""
    best = float(runs.x[runs.best])
    return Valley(
        minimum=best,
        interval=(-math.inf, math.inf),
        loss_at_minimum=float(runs.mean[runs.best]),
        curvature=math.nan,
        noise=math.nan,
        curve=(),
        used=tuple(p for at_one_lr in runs.at for p in at_one_lr),
        diverged=runs.diverged,
        edge=runs.edge(best),
        warning=None,
        verdict=f"undetermined: {why}",
    )
