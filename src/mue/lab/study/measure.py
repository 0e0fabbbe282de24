"""What a study's rows say: of each cell the loss at the transferred value, drift, regret and attained loss, with intervals.

* **transferred**: mean loss over seeds at multiplier 1, which is what a user gets.
* **drift**: octaves from the transferred rate to the minimum of the target's own valley.
* **regret**: the curve at the transferred rate minus its minimum, in nats, and in percent of the steps by how the loss falls in the
  stable phase.
* **attained**: the curve at its minimum, what retuning the rate would give.

Drift, regret and attained loss are read off one posterior of curves (``mue.lab.valley.posterior``), whose noise is shared by the runs of a
seed. Losses of two approaches are compared seed by seed, for most of a seed's noise is common to them; the differences' spread is pooled
over each axis, since two or three seeds alone say little of it, and Student's quantile has the pooled degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mue.lab.study.schedule import Rows, Schedule
from mue.lab.study.spec import BASE, StudyCell, octave
from mue.lab.valley.fit import Valley, fit_with_posterior
from mue.lab.valley.window import LossPoint
from mue.shapes.hparams import warmup_steps
from mue.util.statistics import student_quantile

_TAIL = 0.025


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval; an end nobody knows is infinite."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def to_list(self) -> list[float | None]:
        """For JSON."""
        return [round(x, 6) if math.isfinite(x) else None for x in (self.value, self.low, self.high)]


@dataclass(frozen=True)
class CellMeasures:
    """What the runs of one cell say.

    Attributes:
        losses: multiplier → seed → loss, infinite where the run diverged; only runs that have ended.
        planned: how many runs were asked for.
        valley: over log2 of the multiplier; None with fewer than three multipliers that have a loss.
        drift, regret, attained: None without a valley. regret_steps: regret in percent of the steps; None where the runs show no fall.
        keys_at_1: seed → key of the run at the transferred value.
    """

    cell: StudyCell
    losses: Mapping[float, Mapping[int, float]]
    planned: int
    valley: Valley | None = None
    drift: Interval | None = None
    regret: Interval | None = None
    attained: Interval | None = None
    regret_steps: float | None = None
    keys_at_1: Mapping[int, str] = field(default_factory=dict, repr=False)

    @property
    def transferred(self) -> Mapping[int, float]:
        """Seed → loss at multiplier 1."""
        return self.losses.get(1.0, {})

    @property
    def mean(self) -> float | None:
        """The loss at the transferred value, mean over seeds; infinite where a seed diverged, None where none has ended."""
        return float(np.mean(list(self.transferred.values()))) if self.transferred else None

    @property
    def tokens_per_parameter(self) -> float:
        training, shape = self.cell.target.training, self.cell.target.shape
        return training.batch * training.steps / shape.active_parameters

    @property
    def bracketed(self) -> bool:
        """Is the minimum between two multipliers that were tried, on both sides?"""
        return self.valley is not None and self.valley.edge is None


def measure(schedule: Schedule, rows: Rows) -> list[CellMeasures]:
    """Every cell of a study, in its order.

    Args:
        rows: of runs that ended, by key.
    """
    return [_measured(schedule, i, rows) for i in range(len(schedule.cells))]


def _measured(schedule: Schedule, place: int, rows: Rows) -> CellMeasures:
    runs = list(schedule.runs_of(place, rows))
    losses: dict[float, dict[int, float]] = {}
    for p in runs:
        if (row := rows.get(p.run.key)) is not None:
            losses.setdefault(p.multiplier, {})[p.seed] = math.inf if row["val_loss"] is None else row["val_loss"]
    cell, keys = schedule.cells[place], {p.seed: p.run.key for p in runs if p.multiplier == 1.0}
    found = CellMeasures(cell, dict(sorted(losses.items())), len(runs), keys_at_1=keys)
    points = [LossPoint(octave(m), y, seed) for m, at in losses.items() for seed, y in at.items()]
    if len({p.log2_lr for p in points if math.isfinite(p.loss)}) < 3:
        return found
    valley, posterior, _ = fit_with_posterior(points)
    if posterior is None:
        return found
    at_one = _at(posterior.mesh, posterior.curves, 0.0)
    lowest = posterior.curves.min(axis=1)
    regret, attained = _spread(at_one - lowest), _spread(lowest)
    slope = _fall(cell, [rows[p.run.key] for p in runs if p.multiplier == 1.0 and p.run.key in rows])
    return CellMeasures(
        cell,
        found.losses,
        found.planned,
        valley=valley,
        drift=Interval(valley.minimum, *valley.interval),
        regret=regret,
        attained=attained,
        regret_steps=100 * math.expm1(regret.value / slope) if slope and regret.value / slope < 5 else None,
        keys_at_1=keys,
    )


def _at(mesh: Any, curves: Any, place: float) -> Any:
    """Every curve of the posterior at a place, held at the ends of the mesh."""
    return np.array([np.interp(place, mesh, curve) for curve in curves])


def _spread(values: Any) -> Interval:
    low, middle, high = np.quantile(values, [_TAIL, 0.5, 1 - _TAIL])
    return Interval(float(middle), float(low), float(high))


def _fall(cell: StudyCell, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """By how many nats the validation loss falls while the steps grow e-fold, over the stable phase of WSD."""
    falls, warmup = [], cell.approach.tuned.warmup
    for row in rows:
        steps = cell.target.training.steps
        # after warmup, before the decay begins: there the loss depends on the steps alone (2405.18392)
        stable = [(s, y) for s, y in row["curve"] if max(0.3 * steps, warmup_steps(warmup, steps)) <= s <= 0.8 * steps]
        if len(stable) >= 2:
            (s0, y0), (s1, y1) = stable[0], stable[-1]
            falls.append((y0 - y1) / math.log(s1 / s0))
    return float(np.mean(falls)) if falls and np.mean(falls) > 0 else None


@dataclass(frozen=True)
class Compared:
    """One approach against another on one target: the loss at transferred values minus the other's, seed by seed.

    Attributes:
        difference: mean and interval, in nats; below 0 the approach is better. seeds: how many pairs.
        targets: how many it is the mean over; ``target`` then says so.
    """

    target: str
    axis: str
    approach: str
    against: str
    difference: Interval
    seeds: int
    targets: int = 1


def compare(measured: Sequence[CellMeasures], reference: str) -> list[Compared]:
    """Every approach against one, at transferred values.

    Args:
        reference: the approach that the others are compared with.

    Returns:
        One for each target and approach that share seeds with the reference and did not diverge, and one for each axis and approach
        with several: the mean over its targets.
    """
    by = {(m.cell.target.axis, m.cell.target.name, m.cell.approach.name): m for m in measured}
    pairs: list[tuple[CellMeasures, list[float]]] = []
    for (axis, target, approach), m in by.items():
        other = by.get((axis, target, reference))
        if approach == reference or other is None or target == BASE:
            continue
        common = [s for s in m.transferred if s in other.transferred]
        differences = [m.transferred[s] - other.transferred[s] for s in common]
        if differences and all(map(math.isfinite, differences)):
            pairs.append((m, differences))
    out: list[Compared] = []
    # of each axis by itself: runs of a quarter of the steps differ ten times as much between seeds as wide ones do
    for axis in dict.fromkeys(m.cell.target.axis for m, _ in pairs):
        mine = [(m, d, by[axis, m.cell.target.name, reference]) for m, d in pairs if m.cell.target.axis == axis]
        out += _with_spread(mine, reference)
    return out


_Pair = tuple[CellMeasures, list[float], CellMeasures]
"""An approach on a target, its differences seed by seed, and what it is compared with."""


def _with_spread(pairs: Sequence[_Pair], reference: str) -> list[Compared]:
    """The differences of one axis, with the spread that all of them show together, and of each approach their mean over targets.

    Runs that two approaches share are one measurement and count once; an approach that comes to the reference's own runs differs
    from it by nothing, which says nothing of the spread.

    Returns:
        None where no seed was repeated.
    """
    distinct = {tuple(sorted(m.keys_at_1.values())): d for m, d, other in pairs if m.keys_at_1 != other.keys_at_1}
    freedom = sum(len(d) - 1 for d in distinct.values())
    squares = sum(float(np.var(d) * len(d)) for d in distinct.values())
    if not freedom:
        return []
    spread, quantile = math.sqrt(squares / freedom), student_quantile(1 - _TAIL, freedom)

    def compared(target: str, m: CellMeasures, differences: list[float], same: bool) -> Compared:
        mean, half = float(np.mean(differences)), 0.0 if same else quantile * spread / math.sqrt(len(differences))
        interval = Interval(mean, mean - half, mean + half)
        return Compared(target, m.cell.target.axis, m.cell.approach.name, reference, interval, len(differences))

    out = [compared(m.cell.target.name, m, d, m.keys_at_1 == other.keys_at_1) for m, d, other in pairs]
    for approach in dict.fromkeys(m.cell.approach.name for m, _, _ in pairs):
        mine = [(m, d) for m, d, other in pairs if m.cell.approach.name == approach and m.keys_at_1 != other.keys_at_1]
        if len(mine) > 1:
            together = compared(f"{len(mine)} targets", mine[0][0], [x for _, d in mine for x in d], same=False)
            out.append(replace(together, targets=len(mine)))
    return out
