"""Another number of experts in every layer, as a schedule over depth (DynaMoE, 2603.01697): the total stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import groupby

from mue.shapes.transformer import Mixed, MoE, Transformer
from mue.util.errors import nearest

# Of the depth from 0 to 1: how far above (1) or below (-1) the mean a layer lies.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "uniform": lambda u: 0.0,
    "descending": lambda u: 1.0 - 2.0 * u,
    "ascending": lambda u: 2.0 * u - 1.0,
    "pyramid": lambda u: 1.0 - 2.0 * abs(2.0 * u - 1.0),
    "inverse-pyramid": lambda u: 2.0 * abs(2.0 * u - 1.0) - 1.0,
    "wave": lambda u: math.sin(2.0 * math.pi * u),
}
# What of a token's active experts a layer has: as many as every other, or in proportion to its experts.
ACTIVE = ("same", "share")


def layer_schedule(shape: MoE, name: str, spread: float = 0.5, active: str = "same") -> Mixed:
    """The same model with its experts shared out over depth.

    Args:
        shape: with N routed experts in each of L layers.
        name: of :data:`SCHEDULES`: ``"descending"`` has most experts in the first layers, ``"pyramid"`` in the middle ones.
        spread: how far the layers lie from N at most, as a part of it, before rounding to whole experts.
        active: ``"same"``: a in every layer; ``"share"``: in proportion to its experts, at least one.

    Returns:
        Blocks of equal layers side by side; their experts sum to L·N.

    Raises:
        ValueError: an unknown name, a spread outside [0, 1), a layer that would have fewer experts than active ones, groups.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}{nearest(str(name), SCHEDULES)}")
    if active not in ACTIVE:
        raise ValueError(f"active of a schedule must be one of {', '.join(ACTIVE)}, got {active!r}")
    if isinstance(spread, bool) or not isinstance(spread, int | float) or not 0.0 <= spread < 1.0:
        raise ValueError(f"spread of a schedule must be a number from 0 and below 1, got {spread!r}")
    (block,) = shape.blocks
    if not block.experts:
        raise ValueError("a schedule shares out routed experts, and the shape has none")
    if block.pools:
        raise ValueError(
            f"a schedule shares out the experts of each layer, and those of {block.notation} lie in pools that layers share: leave one"
            " of them out"
        )
    if block.groups > 1:
        raise ValueError(
            f"a schedule over layers and {block.groups} groups of experts do not go together: leave groups out"
        )
    if block.gate_moments is not None:
        raise ValueError(
            "gate_moments are one layer's, and layers of a schedule differ: write them in [[target.blocks]]"
        )
    counts = _counts(block.experts, shape.layers, SCHEDULES[name], float(spread))
    blocks = []
    for number, layers in groupby(counts):
        used = block.active if active == "same" else max(1, round(block.active * number / block.experts))
        if used > number:
            raise ValueError(
                f"the {name} schedule leaves a layer {number} experts, fewer than {used} active: a smaller spread, or more experts"
            )
        blocks.append(replace(block, layers=len(list(layers)), experts=number, active=used))
    common = {f.name: getattr(shape, f.name) for f in fields(Transformer)}
    return Mixed(width=shape.width, blocks=tuple(blocks), **common)


def _counts(experts: int, layers: int, height: Callable[[float], float], spread: float) -> list[int]:
    """Experts of every layer: whole, at least one, and together L·N."""
    heights = [height(layer / (layers - 1) if layers > 1 else 0.5) for layer in range(layers)]
    mean = math.fsum(heights) / layers
    # around their own mean (that of a pyramid over few layers is not 0), and no layer further from N than the spread
    largest = max(1.0, *(abs(h - mean) for h in heights)) if layers > 1 else 1.0
    ideal = [experts * (1.0 + spread * (h - mean) / largest) for h in heights]
    counts = [max(1, math.floor(number + 1e-9)) for number in ideal]
    # what rounding down left over goes where most was cut off, of equals to the first layers
    order = sorted(range(layers), key=lambda layer: (round(counts[layer] - ideal[layer], 9), layer))
    for place in range(experts * layers - sum(counts)):
        counts[order[place % layers]] += 1
    while sum(counts) > experts * layers:  # one expert at least in every layer, at the cost of the largest
        counts[counts.index(max(counts))] -= 1
    return counts
