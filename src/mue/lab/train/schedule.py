"""The learning rate over a run: warmup, then cosine or stable and decay."""

from __future__ import annotations

import math

from mue.lab.train.run import Settings
from mue.shapes import HParams


def lr_factor(step: int, steps: int, tuned: HParams, settings: Settings) -> float:
    """The schedule as a factor on every group's peak lr; ratios between groups never change.

    Args:
        step: the step about to be taken, from 0. steps: of the whole run. tuned: its warmup and floor. settings: its schedule and decay.

    Returns:
        A factor of at most 1; ``tuned.floor`` is what both schedules fall to.
    """
    # Linear warmup over a fraction of the steps, not a number of them: runs of other durations then agree in the time of the
    # limiting SDE, which is what the duration's rules scale by (2205.10287, 2605.23893).
    warmup = max(1, round(tuned.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "cosine":  # 1608.03983, eq. 5, without restarts
        done = (step + 1 - warmup) / max(1, steps - warmup)
        return tuned.floor + (1 - tuned.floor) * 0.5 * (1 + math.cos(math.pi * done))
    # Warmup, stable, decay (2404.06395), with a linear decay (2405.18392 compares forms and lengths of it). The step
    # after the last would be the one at the floor: the last itself still moves, also where the floor is zero.
    decay = max(1, round(settings.decay * steps))
    left = steps - 1 - step
    return 1.0 if left >= decay else tuned.floor + (1 - tuned.floor) * (left + 1) / (decay + 1)
