"""What a plan knows of gates and a shape does not: how far apart a router's logits are at init, and how many tokens a step has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from mue.shapes import Block, Training, Transformer
from mue.shapes.routers import LOGIT_STD, TOKEN_STD


def with_logit_std(shape: Transformer, init_std: Callable[[Block, str], float | None]) -> Transformer:
    """The shape, its routers told the std of their logits where their moments depend on it and nobody said it.

    A router reads d numbers of a normed stream, whose squares are 1 on average at init, so that its logits have the std σ√d.

    Patches of an image differ from each other in a part of that alone (:meth:`mue.shapes.Image.spread`).

    Args:
        init_std: of a block and a role: with which it is drawn; None of the router: not known, and the logits count as even.
    """

    def told(block: Block) -> Block:
        if not block.experts or LOGIT_STD not in (settings := block.all_settings):
            return block
        found, logit_std = {}, settings[LOGIT_STD]
        if logit_std is None and (std := init_std(block, "router")) is not None:
            found[LOGIT_STD] = logit_std = std * math.sqrt(shape.width)
        if shape.image is not None and logit_std is not None and settings.get(TOKEN_STD, 0.0) is None:
            spread = shape.image.spread(shape.width, init_std(block, "patch_embedding") or 0.0)
            found[TOKEN_STD] = logit_std * spread
        return replace(block, router_settings={**block.router_settings, **found}) if found else block

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
