"""What a forward pass of a model gives to whoever trains it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mue.moe import Routing


@dataclass
class Output:
    """What a forward pass gives. Of stacked variants, logits and losses have one entry for each.

    Attributes:
        logits: (B, T, V), or of the last positions alone where only they have targets; what is predicted of images is their velocity,
            (B, C, H, W).
        loss: where targets were given: mean cross-entropy in nats, or of images the mean squared error.
        routings: of each block with routed experts.
        losses: auxiliary ones by name: the routers' (:attr:`mue.moe.Routing.losses`), summed over blocks, and ``consistency``.
    """

    logits: Tensor
    loss: Tensor | None = None
    routings: list[Routing] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
