"""Stop a run early when its training curve shows that it cannot end near the valley's minimum.

The rule is careful, for two reasons that recorded sweeps show: small learning rates look hopeless at a third of the training
and are not at its end, and even a run far up the wall tells the fit how steep the wall is. Chosen on fifteen sweeps so that the
fitted minimum stays where it was; eight others tell whether it does (``docs/results/valley_search.json``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["hopeless"]

Curve = Sequence[tuple[int, float]]

_EARLIEST = 0.5  # share of the training that has to be seen
_BEHIND = 0.45  # of the progress that the best run had made by the same step
_SMOOTH = 0.15  # share of the training over which losses of single batches are averaged


def hopeless(curve: Curve, finished: Sequence[Curve], steps: int) -> bool:
    """Whether a run may be stopped now: it has made far less progress than the best finished run had by the same step.

    curve: (step, training loss) so far. finished: the whole curves of runs of the same sweep, whatever their learning
    rates. steps: the length of a whole run. A run that may have diverged (a loss that is not finite) is not ours to judge.
    """
    if not curve or not finished or curve[-1][0] < _EARLIEST * steps:
        return False
    best = min(finished, key=lambda other: _recent(other, steps, steps))
    step = curve[-1][0]
    here, there, start = _recent(curve, step, steps), _recent(best, step, steps), best[0][1] if best else math.nan
    return math.isfinite(here) and here - there > _BEHIND * (start - there) > 0


def _recent(curve: Curve, step: int, steps: int) -> float:
    """Mean loss over the last part of the training before a step; inf where there is none or it is not finite."""
    losses = [loss for at, loss in curve if step - _SMOOTH * steps < at <= step]
    mean = sum(losses) / len(losses) if losses else math.inf
    return mean if math.isfinite(mean) else math.inf
