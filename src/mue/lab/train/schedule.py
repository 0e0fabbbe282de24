"""The learning rate over a run: warmup, then cosine or stable and decay."""

from __future__ import annotations

import math

from mue.lab.train.run import Settings
from mue.shapes import HParams


def lr_factor(step: int, steps: int, tuned: HParams, settings: Settings) -> float:
    """The schedule as a factor on every group's peak lr; ratios between groups never change.

    Warmup is linear over ``tuned.warmup`` of the steps (a fraction, so that it scales with the duration: SDE time).
    """
    warmup = max(1, round(tuned.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "cosine":
        done = (step + 1 - warmup) / max(1, steps - warmup)
        return tuned.floor + (1 - tuned.floor) * 0.5 * (1 + math.cos(math.pi * done))
    decay = max(1, round(settings.decay * steps))
    left = steps - 1 - step
    return 1.0 if left >= decay else tuned.floor + (1 - tuned.floor) * (left + 1) / (decay + 1)
