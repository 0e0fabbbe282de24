"""The learning rate over a run: a warmup, then one of four shapes down to the floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from mue.shapes import HParams
from mue.shapes.hparams import warmup_steps


class Scheduled(Protocol):
    """What a schedule reads of a run's settings."""

    @property
    def schedule(self) -> str: ...
    @property
    def decay(self) -> float: ...
    @property
    def shift(self) -> int: ...


class Fall(NamedTuple):
    """How far a schedule has come after its warmup: ``left`` of ``of`` equal parts are to go from ``start`` down to the floor."""

    left: float
    of: float
    start: float = 1.0


# A shape takes the step and the number of steps after the warmup, the steps of the whole run, and its settings. The step after the
# last would be the one at the floor: the last itself still moves, also where the floor is zero.


def _cosine(step: int, length: int, steps: int, run: Scheduled) -> Fall:
    """1608.03983, equation 5, without restarts; the last step is at the floor."""
    return Fall(0.5 * (1 + math.cos(math.pi * ((step + 1) / max(1, length)))), 1.0)


def _linear(step: int, length: int, steps: int, run: Scheduled) -> Fall:
    """Linear from the end of the warmup to the floor, which is zero as 2502.15938 has it."""
    return Fall(length - step, length + 1)


def _wsd(step: int, length: int, steps: int, run: Scheduled) -> Fall:
    """Warmup, stable, decay (2404.06395), with a linear decay (2405.18392 compares forms and lengths of it)."""
    decay = max(1, round(run.decay * steps))
    left = length - 1 - step
    return Fall(1.0, 1.0) if left >= decay else Fall(left + 1, decay + 1)


def _wsqd(step: int, length: int, steps: int, run: Scheduled) -> Fall:
    """WSD with a base of 1/√(t + T0) in place of the constant (2607.10959): the base knows no length, one peak serves all of them.

    T0 is ``shift``: the steps of the short run on which the peak was tuned. t counts from the end of the warmup, where the base is 1.
    """
    # the decay leaves the base where it began, and is linear from there
    t = max(0, min(step, length - max(1, round(run.decay * steps)) - 1))
    return _wsd(step, length, steps, run)._replace(start=math.sqrt(run.shift / (run.shift + t)))


SCHEDULES: Mapping[str, Callable[[int, int, int, Scheduled], Fall]] = {
    "wsd": _wsd,
    "cosine": _cosine,
    "linear": _linear,
    "wsqd": _wsqd,
}
DECAYING = ("wsd", "wsqd")  # those that read ``decay``


def lr_factor(step: int, steps: int, tuned: HParams, settings: Scheduled) -> float:
    """The schedule as a factor on every group's peak lr; ratios between groups never change.

    Args:
        step: the step about to be taken, from 0. steps: of the whole run. tuned: its warmup and floor. settings: its schedule, decay and shift.

    Returns:
        A factor of at most 1; ``tuned.floor`` is what all schedules fall to.
    """
    # A linear warmup over a fraction of the steps: runs of other durations then agree in the time of the limiting SDE, which is
    # what the duration's rules scale by (2205.10287, 2605.23893). Or over a number of them, where a length is not to matter.
    warmup = max(1, round(warmup_steps(tuned.warmup, steps)))
    if step < warmup:
        return (step + 1) / warmup
    left, of, start = SCHEDULES[settings.schedule](step - warmup, steps - warmup, steps, settings)
    start = max(start, tuned.floor)  # a base that falls with the steps passes the floor in a long run
    return start if left >= of else tuned.floor + (start - tuned.floor) * left / of
