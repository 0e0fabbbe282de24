"""Where a model's own valley lies against a learning rate it was given: the evidence that a transfer asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mue.lab.valley.fit import Valley, fit_valley
from mue.lab.valley.window import LossPoint


@dataclass(frozen=True)
class MultiplierCheck:
    """One run at each multiple of the given learning rate, and the valley through them.

    Attributes:
        losses: multiplier → loss in nats; None where the run diverged.
        valley: over log2 of the multiplier; None where every run diverged.
    """

    losses: Mapping[float, float | None]
    valley: Valley | None

    @classmethod
    def of(cls, losses: Mapping[float, float | None]) -> MultiplierCheck:
        """The check with its valley fitted.

        Args:
            losses: multiplier of the learning rate → loss; None where the run diverged.
        """
        points = _points(losses)
        return cls(losses, fit_valley(points) if any(math.isfinite(p.loss) for p in points) else None)

    @property
    def best(self) -> float | None:
        """The multiplier of the lowest run."""
        finite = {m: loss for m, loss in self.losses.items() if loss is not None}
        return min(finite, key=finite.__getitem__) if finite else None

    @property
    def regret(self) -> float | None:
        """What the given learning rate (multiplier 1) gives away to the lowest run, in nats."""
        lowest, given = None if self.best is None else self.losses[self.best], self.losses.get(1.0)
        return None if lowest is None or given is None else given - lowest

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "losses": {f"{m:g}": loss for m, loss in self.losses.items()},
            "valley": self.valley and self.valley.to_dict(),
            "loss_at_1": self.losses.get(1.0),
            "best_multiplier": self.best,
            "regret_vs_best_run": self.regret,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MultiplierCheck:
        """The check that :meth:`to_dict` wrote."""
        losses = {float(m): loss for m, loss in data["losses"].items()}
        return cls(losses, data["valley"] and Valley.from_dict(data["valley"], _points(losses)))


def _points(losses: Mapping[float, float | None]) -> list[LossPoint]:
    return [LossPoint(math.log2(m), math.inf if loss is None else loss) for m, loss in losses.items()]
