"""Stop a run early when it lies where the valley's fit does not look, and will not be what the sweep is looking for.

    hopeless(PartialRun(-3.0, seed=1, curve=[(10, 5.1), ...]), others, steps=1000)

Far behind is not enough: small learning rates look hopeless at a third of the training and are not at its end, and a run up
a wall still tells the fit how steep the wall is, within the reach of the fit. So a run is given up only where it lies beyond
that reach from wherever the minimum may be, and only once its curve shows that there is no second valley. A sweep over many
octaves loses its far ends so; one over a few loses nothing, for there every run tells something. Measured on recorded
sweeps: ``docs/results/valley_pruning.json``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from mue.lab.valley.fit import fit_valley
from mue.lab.valley.window import REACH, LossPoint

Curve = Sequence[tuple[int, float]]
"""A run's training loss so far: (step, nats), ascending."""
# These and the next two were chosen on the first fifteen recorded sweeps over six octaves and the first four over
# twelve (benchmarks/valley_pruning.py); an earlier rule that saved 18 % moved half of the minima (docs/LOG.md, "Fewer
# runs").
RUNGS = (0.2, 0.25, 0.33, 0.4, 0.5, 0.6, 0.7)
"""Shares of the training at which a run is judged."""
_SMOOTH = 0.15  # share of the training over which losses of single batches are averaged
_GAIN = 1.5  # times the largest gain of a finished run from the same step on, at most, is still to come
_FEWEST = 3  # learning rates with a loss, before which there is no valley to judge by


@dataclass(frozen=True)
class PartialRun:
    """One run of a sweep, as far as it went.

    Attributes:
        curve: (step, training loss in nats). loss: at its end; NaN or inf: it diverged; None: it was stopped early, or still trains.
    """

    log2_lr: float
    seed: int
    curve: Curve
    loss: float | None = None


def rung(step: int, steps: int) -> int:
    """How many of the :data:`RUNGS` a run has passed: it is judged when this grows.

    Args:
        step: steps done. steps: of a whole run.
    """
    return bisect_right(RUNGS, step / steps)


def hopeless(run: PartialRun, others: Sequence[PartialRun], steps: int) -> bool:
    """Whether a run may be stopped now.

    Args:
        run: as far as it is. One that may have diverged (a loss that is not finite) is not ours to judge.
        others: those of the same valley (one cell) that have ended; the stopped ones have no loss.
        steps: length of a whole run.

    Returns:
        Whether it lies beyond the fit's reach (four octaves) from the whole interval of the minimum, and even its best
        end is above the best run. Held out, the fitted minimum stayed within 0.05 octaves in 192 of 192 orders of
        recorded sweeps (docs/LOG.md, "Early stopping asks the fit").
    """
    trained = [o for o in others if o.loss is not None and math.isfinite(o.loss)]
    if not run.curve or len({o.log2_lr for o in trained}) < _FEWEST:
        return False
    if not _at_best(run.curve, trained, steps) > min(o.loss or 0.0 for o in trained):
        return False
    low, high = fit_valley(
        LossPoint(o.log2_lr, math.inf if o.loss is None else o.loss, o.seed) for o in others
    ).interval
    return run.log2_lr < low - REACH or run.log2_lr > high + REACH


def _at_best(curve: Curve, trained: Sequence[PartialRun], steps: int) -> float:
    """The loss that a run ends at if it gains what finished runs still did and more, or what its own pace promises."""
    step, start = curve[-1][0], curve[0][1]
    here = _recent(curve, step, steps)
    if not math.isfinite(here):
        return -math.inf
    gains = [_recent(o.curve, step, steps) - (o.loss or 0.0) for o in trained]
    gain = _GAIN * max((g for g in gains if math.isfinite(g)), default=math.inf)
    return here - max(gain, (start - here) * (steps - step) / step)


def _recent(curve: Curve, step: int, steps: int) -> float:
    """Mean loss over the last part of the training before a step; inf where there is none or it is not finite."""
    losses = [loss for at, loss in curve if step - _SMOOTH * steps < at <= step]
    mean = sum(losses) / len(losses) if losses else math.inf
    return mean if math.isfinite(mean) else math.inf
