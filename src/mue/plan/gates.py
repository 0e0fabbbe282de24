"""What a plan knows of gates and a shape does not: how far apart a router's logits are at init, and how many tokens a step has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from mue.shapes import Block, Training, Transformer
from mue.shapes.routers import LOGIT_STD


def with_logit_std(shape: Transformer, router_std: Callable[[Block], float | None]) -> Transformer:
    """The shape, its routers told the std of their logits where their moments depend on it and nobody said it.

    A router reads d numbers of a normed stream, whose squares are 1 on average at init, so that its logits have the std σ√d.

    Args:
        router_std: σ, with which a block's router is drawn; None: not known, and the logits count as even.
    """

    def told(block: Block) -> Block:
        if not block.experts or LOGIT_STD not in (settings := block.all_settings) or settings[LOGIT_STD] is not None:
            return block
        if (std := router_std(block)) is None:
            return block
        return replace(block, router_settings={**block.router_settings, LOGIT_STD: std * math.sqrt(shape.width)})

    blocks = shape.blocks
    found = [told(block) for block in blocks]
    return shape if all(new is old for new, old in zip(found, blocks, strict=True)) else shape.with_blocks(found)


def refuse_batch(shape: Transformer, training: Training | None) -> None:
    """Refuse a run whose steps, or whose sequences, a router of the shape cannot route; ``ValueError`` names the router and the fix."""
    for block in shape.blocks:
        if not block.experts:
            continue
        kind, numbers = block.router_kind, (block.active, block.experts, block.all_settings)
        if kind.fits_sequence is not None:
            kind.fits_sequence(*numbers, shape.sequence)
        if training is not None and kind.fits_batch is not None:
            kind.fits_batch(*numbers, training.batch)
