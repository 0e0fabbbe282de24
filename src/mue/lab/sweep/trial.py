"""One trial of a sweep as data: a point, how far it is, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Point = dict[str, float]
"""The values that a sweep looks for (lr, weight decay, init std, perhaps beta1 and beta2), and the seed."""
State = Literal["WAITING", "RUNNING", "COMPLETE", "PRUNED", "FAIL"]
"""Optuna's words: PRUNED was stopped early, FAIL was withdrawn."""
OPEN = ("WAITING", "RUNNING")
About = Mapping[str, Any]
"""What a study says it is a sweep of, beside its trials."""
Check = Callable[[About | None], None]
"""Raises where that (None: nothing yet) is not to be replaced by what is asked now."""


@dataclass(frozen=True)
class Trial:
    """A trial as the storage has it.

    Attributes:
        point: the values and the seed. result: of an ended one, as ``mue.lab.train.run`` stores it, else None.
        owner: the worker that has it or had it last. progress: step and loss as the owner last said.
        quiet: seconds since the owner's last sign of life.
    """

    id: int
    number: int
    state: State
    point: Point
    result: dict[str, Any] | None = None
    owner: str | None = None
    progress: dict[str, Any] | None = None
    quiet: float | None = None

    @classmethod
    def from_rows(cls, attributes: Mapping[str, Any], id: int, number: int, state: State, quiet: float | None) -> Trial:
        """The trial of a row of the storage's table of trials, and of those of its attributes that are ours."""
        get = attributes.get
        silence = None if quiet is None else float(quiet)  # PostgreSQL says a decimal
        return cls(id, number, state, attributes["point"], get("result"), get("owner"), get("progress"), silence)

    @cached_property
    def name(self) -> str:
        """What its point is told apart by (:func:`name_of`)."""
        return name_of(self.point)

    @property
    def seed(self) -> int:
        return int(self.point["seed"])

    @property
    def loss(self) -> float:
        """The validation loss of a completed trial; inf where it has none: it diverged, was stopped, has not ended."""
        loss = (self.result or {}).get("val_loss") if self.state == "COMPLETE" else None
        return math.inf if loss is None else float(loss)


def name_of(point: Mapping[str, float]) -> str:
    """What a point is told apart by: blind to the last bits, which differ between machines that compute a grid.

    Twelve digits: of a double's sixteen enough to tell any two points of a grid apart, and none of those that rounding
        moves.
    """
    return " ".join([f"{k}={value:.12g}" for k, value in sorted(point.items())])
