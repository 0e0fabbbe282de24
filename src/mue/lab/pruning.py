"""Stop a run early when nothing that it may still end at would move the valley's fitted minimum.

    hopeless(Seen(-3.0, seed=1, curve=[(10, 5.1), ...]), others, steps=1000)

Far behind is not enough: even a run far up a wall tells the fit how steep the wall is, and small learning rates look hopeless
at a third of the training and are not at its end. So the fit itself is asked. What a run may end at is bounded by its own
curve and by what finished runs still gained from the same step on; the valley is fitted with this run and every one that
was stopped before at their upper bounds, at their lower bounds, and without them. Where the three minima agree, the run is
not needed. A sweep over many octaves loses its far ends so; one over a few keeps nearly everything, for there every run
tells something. Measured on recorded sweeps: ``docs/results/valley_search.json``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from mue.lab.storage_trials import Curve
from mue.lab.valley import Point, fit_valley

__all__ = ["RUNGS", "Seen", "hopeless", "rung"]

RUNGS = (0.2, 0.25, 0.33, 0.4, 0.5, 0.6, 0.7)
"""Shares of the training at which a run is judged."""
_MOVES = 0.03  # octaves by which the minimum may move, whatever the stopped runs would have ended at
_SMOOTH = 0.15  # share of the training over which losses of single batches are averaged
_GAIN = 1.5  # times the largest gain of a finished run from the same step on, at most, is still to come
_FEWEST = 3  # learning rates with a loss, before which there is no valley to judge by


@dataclass(frozen=True)
class Seen:
    """One run of a sweep, as far as it went.

    curve: (step, training loss). loss: at its end; NaN or inf: it diverged; None: it was stopped early, or still trains.
    """

    log2_lr: float
    seed: int
    curve: Curve
    loss: float | None = None


def rung(step: int, steps: int) -> int:
    """How many of the rungs a run has passed: it is judged when this grows."""
    return bisect_right(RUNGS, step / steps)


def hopeless(run: Seen, others: Sequence[Seen], steps: int) -> bool:
    """Whether a run may be stopped now.

    others: those of the same valley (one weight decay, one init std) that have ended; the stopped ones have no loss.
    steps: length of a whole run. A run that may have diverged (a loss that is not finite) is not ours to judge.
    """
    finished = [o for o in others if o.loss is not None]
    trained = [o for o in finished if math.isfinite(o.loss or 0.0)]
    if not run.curve or run.curve[-1][0] >= steps or len({o.log2_lr for o in trained}) < _FEWEST:
        return False
    stopped = [(o, _bounds(o, trained, steps)) for o in (*(o for o in others if o.loss is None), run)]
    best = min(o.loss or 0.0 for o in trained)
    low, high = stopped[-1][1]
    if not (math.isfinite(high) and low > best):
        return False
    known = [Point(o.log2_lr, o.loss or 0.0, o.seed) for o in finished]

    def minimum(side: int | None) -> float:
        ends = (math.inf if side is None else bounds[side] for _, bounds in stopped)
        points = [Point(o.log2_lr, end, o.seed) for (o, _), end in zip(stopped, ends, strict=True)]
        return fit_valley(known + points).minimum

    without = minimum(None)
    return all(abs(minimum(side) - without) <= _MOVES for side in (0, 1))


def _bounds(run: Seen, trained: Sequence[Seen], steps: int) -> tuple[float, float]:
    """What a run may end at: no gain from here on, or the most that finished runs had or that its own pace promises."""
    step, start = run.curve[-1][0], run.curve[0][1]
    here = _recent(run.curve, step, steps)
    gains = [_recent(o.curve, step, steps) - o.loss for o in trained if o.loss is not None]
    gain = _GAIN * max((g for g in gains if math.isfinite(g)), default=math.inf)
    return here - max(gain, (start - here) * (steps - step) / step), here


def _recent(curve: Curve, step: int, steps: int) -> float:
    """Mean loss over the last part of the training before a step; inf where there is none or it is not finite."""
    losses = [loss for at, loss in curve if step - _SMOOTH * steps < at <= step]
    mean = sum(losses) / len(losses) if losses else math.inf
    return mean if math.isfinite(mean) else math.inf
