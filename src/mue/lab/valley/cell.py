"""Where in a sweep a valley over the learning rate lies: the values that all runs of a cell share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BETAS, ADAMW_LR = ("beta1", "beta2"), "adamw_lr"
"""How points name Adam's betas, which are a pair in everything else, and AdamW's rate beside Muon; points of a sweep that does not
look for them lack them."""


@dataclass(frozen=True, order=True)
class CellValues:
    """The tuned values of a cell, beside the lr. betas, adamw_lr (a single value): empty where the sweep does not look for them."""

    weight_decay: float
    init_std: float
    betas: tuple[float, ...] = ()
    adamw_lr: tuple[float, ...] = ()

    @classmethod
    def of(cls, point: Mapping[str, float]) -> CellValues:
        """The cell in which a point of a sweep lies."""
        betas, rate = (tuple(point[name] for name in names if name in point) for names in (BETAS, (ADAMW_LR,)))
        return cls(point["weight_decay"], point["init_std"], betas, rate)

    @property
    def point(self) -> dict[str, float]:
        """As points have them, a number under each name."""
        return {
            "weight_decay": self.weight_decay,
            "init_std": self.init_std,
            **dict(zip(BETAS, self.betas, strict=False)),
            **dict(zip((ADAMW_LR,), self.adamw_lr, strict=False)),
        }

    @property
    def tuned(self) -> dict[str, Any]:
        """As :class:`mue.shapes.HParams` and files have them: betas as a pair."""
        return tuned_from_point(self.point)

    @property
    def columns(self) -> dict[str, str]:
        """For tables: what it is → in words."""
        return {"weight decay": f"{self.weight_decay:g}", "init std": f"{self.init_std:g}", **self.more}

    @property
    def more(self) -> dict[str, str]:
        """Of :attr:`columns` those that not every sweep has: betas and AdamW's lr, where it looks for them."""
        return {
            **({"betas": betas_words(self.betas)} if self.betas else {}),
            **({"AdamW lr": f"{self.adamw_lr[0]:.4g}"} if self.adamw_lr else {}),
        }

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.columns.items())


def tuned_from_point(point: Mapping[str, float]) -> dict[str, Any]:
    """A point's tuned values as :class:`mue.shapes.HParams` has them: without the seed, betas as a pair."""
    found: dict[str, Any] = {name: value for name, value in point.items() if name not in (*BETAS, "seed")}
    return found | ({"betas": tuple(point[name] for name in BETAS)} if BETAS[0] in point else {})


def each(values: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """An axis of single values as cells have them; of one that is not looked for, the one empty value."""
    return tuple((value,) for value in values) or ((),)


def betas_words(betas: tuple[float, ...]) -> str:
    """``"0.9/0.95"``."""
    return "/".join(f"{beta:g}" for beta in betas)
