"""Stop a run early when its training curve shows that it cannot end near the valley's minimum."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["hopeless"]

Curve = Sequence[tuple[int, float]]

_FINISHED = 3  # curves to compare with before anything is stopped
_EARLIEST = 0.3  # share of the training that has to be seen
_FACTOR = 6.0  # how far above the best, in spreads of the better half


def hopeless(curve: Curve, finished: Sequence[Curve], steps: int) -> bool:
    """Whether a run may be stopped now: its loss is far above every finished run's at the same step.

    curve: (step, training loss) so far. finished: the whole curves of runs of the same sweep, whatever their learning
    rates. steps: the length of a whole run. A run that may have diverged (a loss that is not finite) is not ours to judge.
    """
    if not curve or len(finished) < _FINISHED or curve[-1][0] < _EARLIEST * steps:
        return False
    step = curve[-1][0]
    here = sorted(min(_at(c, step), math.inf) for c in finished)
    spread = here[len(here) // 2] - here[0]
    return math.isfinite(spread) and curve[-1][1] > here[0] + _FACTOR * max(spread, 0.05)


def _at(curve: Curve, step: int) -> float:
    return next((loss for at, loss in reversed(curve) if at <= step), math.inf)
