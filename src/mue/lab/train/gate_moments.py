"""Moments of a router's weights, measured: what ``gates = "measured"`` of a plan takes (docs/why/index.md#gates).

A model of the plan's shape is initialised by the plan several times, each time with other weights and other text, and its routers
are watched in one forward pass each. What no router sees is small: the width of an expert is the rule's business, by which the
branch is as large at any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mue.lab.data import Batches, Corpus
from mue.lab.train.run import Settings
from mue.lab.train.task import task_of
from mue.model.apply import init_
from mue.moe.routing import gate_moments
from mue.plan.plan import Inputs
from mue.plan.transfer import plan_of
from mue.shapes import MEASURED, ROUTERS, Block, Transformer
from mue.util.statistics import mean_of
from mue.util.text import number

EXPERT_WIDTH = 16  # of the model that is watched, at most
SEQUENCE = 256  # tokens, at most: attention costs their square, and at init hardly changes what a router sees


@dataclass(frozen=True)
class LayerGates:
    """One layer's weights at init, R divided out: means over inits, each with half its 95 % interval.

    Attributes:
        m1, m2: E[Σw] and E[Σw²] over tokens. active: experts of a token, on average.
        error1, error2: of m1 and m2; tokens of one init share its router, so these are over inits.
    """

    layer: int
    m1: float
    m2: float
    error1: float
    error2: float
    active: float


def needs_measuring(table: Mapping[str, Any]) -> bool:
    """Whether the router of a ``[target]`` or ``[[target.blocks]]`` table has weights that do not sum to one.

    Raises:
        ValueError: it names no router that there is.
    """
    router = table.get("router", "sigmoid")
    settings = dict(router) if isinstance(router, Mapping) else {}
    kind = ROUTERS.lookup(settings.pop("name", "") if isinstance(router, Mapping) else router)
    return "moe" in table and not kind.sums_to_one(table.get("normalize") is not False, kind.chosen(settings))


def measure_gates(
    inputs: Inputs, settings: Settings, corpus: Corpus, *, draws: int = 8, tokens: int = 2048
) -> list[LayerGates]:
    """Measure every layer with routed experts.

    Args:
        inputs: of the plan. Blocks with ``gates = "measured"`` may have any moments: a first round replaces them, since what they
            are decides how large their branches are, which later layers read. settings: of the run. corpus: what it trains on.
        draws: inits, 2 or more. tokens: of each.

    Raises:
        ValueError: no block has routed experts; the text has more tokens than the model's vocabulary, or is too short.
    """
    assert draws >= 2  # an interval needs two
    if corpus.vocab > inputs.target.vocab:
        raise ValueError(
            f"the data has {corpus.vocab} tokens, the model a vocabulary of {inputs.target.vocab}: raise vocab"
        )
    if not any(block.experts for block in inputs.target.blocks):
        raise ValueError(f"{inputs.target.name} has no routed experts, and so no gates to measure")
    first = _measured(inputs, settings, corpus, 2, tokens)
    return _measured(replace(inputs, target=_with_means(inputs.target, first)), settings, corpus, draws, tokens)


def by_layer(shape: Transformer, layers: Sequence[LayerGates]) -> list[tuple[float, float]]:
    """The moments that a file says of neighbouring layers: one pair where they agree, else one for each layer.

    Neighbours that agree with their mean within their intervals or within 2 % of m1 and 4 % of m2 (1 % of R and of σ_down) share one.
    Layers that read one pool of experts share it as well: their weights are drawn once.
    """
    groups: list[list[LayerGates]] = []
    for one in layers:
        if groups and (shape.per_layer[one.layer].pools or _agree([*groups[-1], one])):
            groups[-1].append(one)
        else:
            groups.append([one])
    pairs = [_mean(group) for group in groups for _ in group]
    return pairs[:1] if len(groups) == 1 else pairs


def _agree(layers: Sequence[LayerGates]) -> bool:
    m1, m2 = _mean(layers)
    return all(
        abs(one.m1 - m1) <= max(one.error1, 0.02 * m1) and abs(one.m2 - m2) <= max(one.error2, 0.04 * m2)
        for one in layers
    )


def _mean(layers: Sequence[LayerGates]) -> tuple[float, float]:
    """Rounded as a file has them."""
    return (
        float(f"{sum(one.m1 for one in layers) / len(layers):.6g}"),
        float(f"{sum(one.m2 for one in layers) / len(layers):.6g}"),
    )


@torch.no_grad()
def _measured(inputs: Inputs, settings: Settings, corpus: Corpus, draws: int, tokens: int) -> list[LayerGates]:
    shape = _shrunk(inputs.target)
    plan, task = plan_of(replace(inputs, target=shape)), task_of(settings)
    places = [layer for layer, block in enumerate(shape.per_layer) if block.experts]
    length = min(shape.sequence, SEQUENCE)
    found: list[list[tuple[float, float, float]]] = [[] for _ in places]
    for draw in range(draws):
        own = replace(settings, seed=settings.seed + draw)
        model = task.build(plan, own)
        init_(plan, model, own.seed)
        batch = Batches(corpus, "train", length, max(1, tokens // length), own.seed).at(0)
        # in training, as it will be trained: what a router drops or draws there is in the moments
        routings = task.loss(model.train(), batch).routings
        for seen, routing in zip(found, routings, strict=True):
            pairs = int((routing.expert_P < routing.num_experts).sum())
            seen.append((*gate_moments(routing), pairs / routing.num_tokens))
    return [_layer(layer, seen) for layer, seen in zip(places, found, strict=True)]


def _layer(layer: int, seen: Sequence[tuple[float, float, float]]) -> LayerGates:
    m1, m2, active = (mean_of(column) for column in zip(*seen, strict=True))
    return LayerGates(layer, m1.value, m2.value, m1.half, m2.half, active.value)


def _shrunk(shape: Transformer) -> Transformer:
    """The shape with narrow experts: by the rule their branch is as large as with wide ones."""

    def narrow(width: int | None) -> int | None:
        return None if width is None else min(width, EXPERT_WIDTH)

    def small(block: Block) -> Block:
        return replace(block, expert=narrow(block.expert), shared=narrow(block.shared)) if block.is_moe else block

    return shape.with_blocks([small(block) for block in shape.blocks])


def _with_means(shape: Transformer, layers: Sequence[LayerGates]) -> Transformer:
    """The shape, each block that takes measured moments with the mean of those of its layers."""
    first, blocks = 0, []
    for block in shape.blocks:
        own = [one for one in layers if first <= one.layer < first + block.layers]
        blocks.append(replace(block, gate_moments=_mean(own)) if block.gates == MEASURED else block)
        first += block.layers
    return shape.with_blocks(blocks)


def table_of_gates(shape: Transformer, layers: Sequence[LayerGates]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a reader: what was measured of each layer, and what follows from it."""
    rows = []
    for one in layers:
        block = shape.per_layer[one.layer]
        R, F = block.active / one.m1, block.active * one.m2 / one.m1**2
        rows.append([
            str(one.layer), block.router, f"{number(one.m1)} ± {one.error1:.1g}", f"{number(one.m2)} ± {one.error2:.1g}",
            number(one.active), number(R), number(F),
        ])  # fmt: skip
    return ["layer", "router", "m1 = E[Σw]", "m2 = E[Σw²]", "active", "R = a/m1", "F = a·m2/m1²"], rows
