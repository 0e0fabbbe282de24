"""What the lab's transformers have in common: a block's feed-forward or experts, pools that layers read, what blocks say of their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mue.lab.models.layers import FeedForward
from mue.layouts.layout import Layout
from mue.moe import ExpertPool, MoELayer, Routing
from mue.moe.routers.base import BaseRouter, RouterOptions
from mue.plan.values import Multipliers
from mue.shapes import Block, Transformer


def checked_multipliers(shape: Transformer, multipliers: Multipliers | None) -> Multipliers:
    """A model's multipliers, those of a stock model where none are given.

    Raises:
        ValueError: they are for another number of layers.
    """
    ones = (1.0,) * shape.layers
    multipliers = multipliers or Multipliers(output=ones, route=ones)
    for name in ("output", "route"):
        given = getattr(multipliers, name)
        if len(given) != shape.layers:
            raise ValueError(f"multipliers.{name} has {len(given)} entries, the shape {shape.layers} layers")
    return multipliers


def feed_forward_of(
    shape: Transformer,
    block: Block,
    multipliers: Multipliers,
    layer: int,
    options: RouterOptions,
    pool: ExpertPool | None,
) -> tuple[FeedForward | None, MoELayer | None]:
    """The dense feed-forward network of a block, or its experts.

    Args:
        shape: of the whole model. block, layer: of this one. multipliers: the plan's. options: what the run says to the router.
        pool: the experts that it reads together with other layers, where they lie in a pool.
    """
    A = multipliers.output[layer] if multipliers.output else 1.0
    if block.ffn is not None:
        return FeedForward(shape.width, block.ffn, shape.gated, A), None
    options = replace(options, route_scale=multipliers.route[layer] if multipliers.route else 1.0, layer=layer)
    return None, MoELayer.from_block(block, shape.width, options, output_multiplier=A, gated=shape.gated, pool=pool)


def pools_of(shape: Transformer) -> tuple[list[tuple[int, ExpertPool | None]], nn.ModuleList]:
    """Of every layer, which pool of experts it reads, and the pool; and all pools, for the model to hold where there are any."""
    found: list[tuple[int, ExpertPool | None]] = [(0, None)] * shape.layers
    made = nn.ModuleList()
    for i, layers in enumerate(shape.pool_layers):
        block = shape.per_layer[layers[0]]
        pool = ExpertPool(shape.width, block.experts, block.expert or 0, gated=shape.gated)
        made.append(pool)
        found[layers[0] : layers[-1] + 1] = [(i, pool)] * len(layers)
    return found, made


def routers_in(blocks: nn.Module) -> list[BaseRouter]:
    """The routers of a model's blocks, in order."""
    return [module for module in blocks.modules() if isinstance(module, BaseRouter)]


def auxiliary(routings: Sequence[Routing]) -> dict[str, Tensor]:
    """The routers' losses by name, summed over blocks."""
    names = dict.fromkeys(name for routing in routings for name in routing.losses)
    return {n: torch.stack([r.losses[n] for r in routings if n in r.losses]).sum(0) for n in names}


def block_rows(shape: Transformer, blocks: Iterable[nn.Module]) -> list[Layout]:
    """Role and axes of every parameter of a model's ``blocks`` and ``pools``, but for what one model's blocks alone have."""
    parts = ("up", "gate", "down") if shape.gated else ("up", "down")
    rows = [Layout(f"blocks.*.attention.{x}.weight", f"attention_{x}", ("out", "in")) for x in "qkvo"]
    rows += [Layout(f"blocks.*.attention.{x}_norm.weight", "qk_norm", ("vector",)) for x in "qk"]
    rows += [Layout(f"blocks.*.{x}_norm.weight", "norm", ("vector",)) for x in ("attention", "ffn")]
    if any(not block.is_moe for block in shape.blocks):
        rows += [Layout(f"blocks.*.ffn.{part}.weight", f"ffn_{part}", ("out", "in")) for part in parts]
    rows += dict.fromkeys(row for block in blocks for row in _router_rows(block))
    if any(block.experts and not block.pools for block in shape.blocks):
        rows += [Layout(f"blocks.*.moe.experts_{p}", f"expert_{p}", ("expert", "out", "in")) for p in parts]
    for i, layers in enumerate(shape.pool_layers):
        rows += [Layout(f"pools.{i}.{p}", f"expert_{p}", ("expert", "out", "in"), layers=layers) for p in parts]
    if any(block.shared_experts for block in shape.blocks):
        rows += [Layout(f"blocks.*.moe.shared_{p}", f"shared_{p}", ("out", "in")) for p in parts]
    return rows


def _router_rows(block: nn.Module) -> list[Layout]:
    """What the router of a block says of its parameters, by their names in the model."""
    router = getattr(getattr(block, "moe", None), "router", None)  # a block of somebody's own need have neither
    rows = router.layout() if isinstance(router, BaseRouter) else []
    return [replace(row, pattern=f"blocks.*.moe.router.{row.pattern}") for row in rows]
