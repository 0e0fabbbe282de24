"""What every source is turned into: runs, cells of runs that differ in learning rate alone, and the valley of a cell.

Legend of units: tokens and batch in tokens (a batch is what one step reads), positions in log2(lr), losses in nats.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REACH = 1.5  # octaves from the lowest run: three half-octave steps to each side
_ROUNDING = 0.05  # octaves: the published rates are rounded to four digits
_DIVERGED = 1.0  # nats above the cell's lowest: files give diverged runs a loss as well, near that of guessing
_PRIOR_RUNS = 4  # weight of the pooled residual variance in a cell's own


@dataclass(frozen=True)
class Shape:
    """A model in the numbers that laws and rules read.

    Attributes:
        name: the source's own. width, layers: d and L. active_width: H_act, the down-projection fan-ins that a token meets.
        total, active: non-embedding parameters, as the source counts them. experts, chosen: N and a, both 1 for dense.
        expert, shared: width of one routed expert and of what every token passes through; of a dense model both 0.
    """

    name: str
    width: int
    layers: int
    active_width: int
    total: float
    active: float
    experts: int = 1
    chosen: int = 1
    expert: int = 0
    shared: int = 0

    @property
    def dense(self) -> bool:
        return self.experts == 1


@dataclass(frozen=True)
class PublishedRun:
    """One finished run of a source."""

    shape: Shape
    tokens: float
    batch: float
    lr: float
    loss: float


@dataclass(frozen=True)
class Valley:
    """A parabola over log2(lr): its lowest place, the standard error of that, its second derivative, the loss there."""

    minimum: float
    error: float
    curvature: float
    loss: float


@dataclass(frozen=True)
class Cell:
    """Runs that differ in the learning rate alone, as (log2 lr, loss), with their valley."""

    shape: Shape
    tokens: float
    batch: float
    runs: tuple[tuple[float, float], ...]
    valley: Valley

    @property
    def steps(self) -> float:
        return self.tokens / self.batch

    def cost(self, log2_lr: float) -> float:
        """Nats above the minimum at a learning rate.

        The parabola where it was fitted, the runs themselves farther out, and beyond the grid the loss at its end, which is
        the least that it can be there.
        """
        off = log2_lr - self.valley.minimum
        if abs(off) <= REACH:
            return self.valley.curvature * off**2 / 2
        x, y = zip(*self.runs, strict=True)
        return max(0.0, float(np.interp(log2_lr, x, y)) - self.valley.loss)


def read_checked(path: Path, sha256: str) -> str:
    """The text of a source's file.

    Raises:
        ValueError: the file is another one than the figures here were made from.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} has sha256 {found}, not {sha256}: its owner has changed it, or it came down broken. Look at what"
            " changed; then give the new sum with --sha256, and say so beside the figures"
        )
    return content.decode("utf-8")


@dataclass(frozen=True)
class _Parabola:
    """Coefficients of a x² + b x + c about the lowest run, and what their error needs."""

    coefficients: np.ndarray
    covariance: np.ndarray  # over the residual variance
    squares: float
    freedom: int
    centre: float


def converged(runs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of a cell's runs, as (log2 lr, loss), that did not diverge."""
    return [run for run in runs if run[1] < min(loss for _, loss in runs) + _DIVERGED]


def _parabola(runs: Sequence[tuple[float, float]], reach: float) -> _Parabola | None:
    """Least squares through the runs within reach of the lowest; None where the lowest place is not inside the grid."""
    if not runs:
        return None
    lowest = min(runs, key=lambda run: run[1])[0]
    near = [run for run in converged(runs) if abs(run[0] - lowest) <= reach + _ROUNDING]
    if len(near) < 4:
        return None
    x, y = np.array(near).T
    design = np.vander(x - lowest, 3)
    covariance = np.linalg.inv(design.T @ design)
    coefficients = covariance @ design.T @ y
    curve, slope, _ = coefficients
    if curve <= 0 or not runs[0][0] < lowest - slope / (2 * curve) < runs[-1][0]:
        return None
    return _Parabola(coefficients, covariance, float(((y - design @ coefficients) ** 2).sum()), len(near) - 3, lowest)


def cells_of(runs: Iterable[PublishedRun], reach: float = REACH) -> tuple[list[Cell], int]:
    """The cells whose valley opens upward with its lowest place inside the grid.

    Args:
        reach: octaves to each side of the lowest run that the parabola is fitted over.

    Returns:
        Those, in order of shape, tokens and batch; and how many cells there were in all.
    """
    grouped: dict[tuple[Shape, float, float], list[tuple[float, float]]] = {}
    for run in runs:
        points = grouped.setdefault((run.shape, run.tokens, run.batch), [])
        if math.isfinite(run.loss):
            points.append((math.log2(run.lr), run.loss))
    fitted = {key: fit for key, points in grouped.items() if (fit := _parabola(sorted(points), reach))}
    free = [fit for fit in fitted.values() if fit.freedom > 0]
    pooled = sum(fit.squares for fit in free) / max(sum(fit.freedom for fit in free), 1)
    cells = [Cell(*key, tuple(sorted(grouped[key])), _valley(fit, pooled)) for key, fit in fitted.items()]
    return sorted(cells, key=lambda c: (c.shape.total, c.shape.active, c.tokens, c.batch)), len(grouped)


def _valley(fit: _Parabola, pooled: float) -> Valley:
    curve, slope, level = fit.coefficients
    variance = (fit.squares + _PRIOR_RUNS * pooled) / (fit.freedom + _PRIOR_RUNS)
    gradient = np.array([slope / (2 * curve**2), -1 / (2 * curve), 0.0])  # of the lowest place, -b/2a
    return Valley(
        minimum=float(fit.centre - slope / (2 * curve)),
        error=float(math.sqrt(variance * gradient @ fit.covariance @ gradient)),
        curvature=float(2 * curve),
        loss=float(level - slope**2 / (4 * curve)),
    )
