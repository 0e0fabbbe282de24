"""A trained model with other numbers of active experts per token than it was trained with: loss against active FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from mue.lab.trained.evaluate import Logits, TextScores, score
from mue.lab.trained.find import TrainedRun
from mue.lab.trained.held_out import Windows
from mue.moe.routers.base import active_experts


class AnyActive(Protocol):
    """A trained model that can be asked with any number of active experts.

    Attributes:
        trained: k, that it was trained with, the largest where blocks differ. experts: N, the least where they differ.
        groups: k′ has to be a multiple of it, of those of all blocks where they differ. scales: those that are asked where nobody says which, from
            :data:`mue.moe.routers.base.SCALES`.
    """

    @property
    def trained(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def scales(self) -> tuple[str, ...]: ...

    @property
    def logits(self) -> Logits:
        """The model as it was trained."""

    def is_trained(self, active: int) -> bool:
        """Whether k′ experts are what every block was trained with: the model is then the trained one to the bit, under any scale."""

    def refusal(self, active: int, scale: str) -> str | None:
        """Why it cannot use k′ experts, a multiple of ``groups`` and at most ``experts``, under a scale; None where it can. Costs next to nothing."""

    def at(self, active: int, scale: str) -> AbstractContextManager[Logits]:
        """The model with k′ experts, as a context; ``ValueError`` where it cannot."""

    def flops(self, active: int | None) -> float:
        """FLOPs of a token's forward pass with k′ experts; None: as trained."""


@dataclass(frozen=True)
class ActivePoint:
    """A model at one k′ under one scale.

    Attributes:
        flops: of a token's forward pass. scores: on the windows that all points share.
    """

    active: int
    scale: str
    flops: float
    scores: TextScores


@dataclass(frozen=True)
class ActiveCurve:
    """All points, and the model as it was trained."""

    trained: ActivePoint
    points: tuple[ActivePoint, ...]

    @property
    def scales(self) -> list[str]:
        return list(dict.fromkeys(point.scale for point in self.points))

    def of(self, scale: str) -> list[ActivePoint]:
        """One scale's points, by k′."""
        return sorted((p for p in self.points if p.scale == scale), key=lambda p: p.active)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        before = self.trained
        return {
            "trained": {"active": before.active, "flops_per_token": before.flops, **before.scores.to_dict()},
            "points": [
                {
                    "active": p.active,
                    "scale": p.scale,
                    "flops_per_token": p.flops,
                    "above_trained": p.scores.above(before.scores).to_list(),
                    **p.scores.to_dict(),
                }
                for p in self.points
            ],
        }


def ask(
    model: AnyActive, active: Sequence[int], scales: Sequence[str], windows: Windows, bytes_of: Sequence[int] | None
) -> Iterator[ActivePoint]:
    """The model as it was trained, then every k′ under every scale, as each is known. All predict the same windows.

    Args:
        bytes_of: as of :func:`mue.lab.trained.evaluate.score`.

    Raises:
        ValueError: with the first point, where the model cannot be asked one of them.
    """
    for k in active:
        for scale in scales:
            if why := model.refusal(k, scale):  # before the first is asked, which may take minutes
                raise ValueError(why)
    before = ActivePoint(model.trained, "trained", model.flops(None), score(model.logits, windows, bytes_of))
    yield before
    for k in active:
        for scale in scales:
            if model.is_trained(k):
                yield replace(before, active=k, scale=scale)
                continue
            with model.at(k, scale) as logits:
                yield ActivePoint(k, scale, model.flops(k), score(logits, windows, bytes_of))


class RunAtAnyActive:
    """A run of the lab as an :class:`AnyActive`.

    Args:
        found: the run. model: its model. logits: of that.

    Raises:
        ValueError: a model without routed experts, or whose router cannot be asked so.
    """

    scales = ("mean", "root")

    def __init__(self, found: TrainedRun, model: nn.Module, logits: Logits) -> None:
        blocks = [block for block in found.run.plan.target.blocks if block.experts]
        if not blocks:
            raise ValueError(f"{found.name} has no routed experts, and so no number of active ones: leave --active out")
        for block in blocks:
            if not block.router_kind.any_active:
                raise ValueError(
                    f"the {block.router} router of {found.name} cannot use another number of experts than it was trained with: leave --active out"
                )
        self.found, self.model, self.logits = found, model, logits
        self._blocks = blocks
        self.trained = max(block.active for block in blocks)
        self.experts = min(block.experts for block in blocks)
        self.groups = math.lcm(*(block.groups for block in blocks))

    def is_trained(self, active: int) -> bool:
        return all(block.active == active for block in self._blocks)

    def refusal(self, active: int, scale: str) -> str | None:
        try:
            with active_experts(self.model, active, scale):
                return None
        except ValueError as error:
            return str(error)

    @contextmanager
    def at(self, active: int, scale: str) -> Iterator[Logits]:
        with active_experts(self.model, active, scale):
            yield self.logits

    def flops(self, active: int | None) -> float:
        shape = self.found.run.plan.target
        # a third of training's; a matrix element is two operations
        trained, matrices = shape.flops_per_token / 3, 3 if shape.gated else 2
        each = [
            2.0 * matrices * shape.width * (block.expert or 0) * block.layers * (active - block.active)
            for block in self._blocks
            if active is not None
        ]
        return trained + sum(each)
