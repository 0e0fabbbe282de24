# ruff: noqa: N815 (shape suffixes in field names)
"""The routers of a model run alone, at their full size, on random tokens: needs no weights, so it works on the meta device.

What :mod:`mue.checks.subjects.gates` looks at where it cannot read the weights off the branches' outputs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mue.checks.context import Context, evaluating
from mue.checks.report import FAIL, PASS, SKIP, WARN, Finding, several
from mue.layouts.layout import HasLayout, canonical, unwrap
from mue.layouts.transformers.shape import Routers
from mue.layouts.transformers.stock import is_stock, observe_stock
from mue.shapes.block import Block
from mue.shapes.routers import RouterKind
from mue.util.text import number

NAME = "gates"
TOKENS = 128  # random ones: enough that a spread of the sums shows, and cheap at full size


@runtime_checkable
class Routed(Protocol):
    """What a router returns, as far as it is read here: mue.moe's Routing, or anything with the same fields."""

    token_P: Tensor
    expert_P: Tensor
    weight_P: Tensor
    num_tokens: int
    num_experts: int


def routers_alone(ctx: Context) -> Iterator[Finding]:
    """The routers, run at their full size on random tokens; a stock family's at a tiny size with the config's switches."""
    if not any(b.experts for b in ctx.plan.target.per_layer):
        yield Finding(NAME, PASS, measured="no routers")
        return
    if isinstance(unwrap(ctx.model), HasLayout):
        yield from _own_routers(ctx)
    else:
        yield from _stock_routers(ctx)


def _own_routers(ctx: Context) -> Iterator[Finding]:
    """Routers of a model that declares its layout: each is a module that can be run alone."""
    blocks, read, found = ctx.plan.target.per_layer, 0, []
    for layer, name, module in _routers(ctx, blocks):
        kind = getattr(module, "kind", None)
        if isinstance(kind, RouterKind) and kind.name != blocks[layer].router:
            found.append(_other_router(name, kind.name, blocks[layer].router))
            continue
        routing = _run(module, ctx.plan.target.width)
        if routing is not None:
            read += 1
            found += list(_routing(ctx, name, layer, routing, blocks[layer]))
    yield from found
    if not read and not found:
        yield Finding(NAME, SKIP, measured="no router module could be run alone: give a batch")
    elif not found:
        yield Finding(NAME, PASS, measured=f"{read} routers, each run alone on {TOKENS} random tokens")


def _routers(ctx: Context, blocks: Sequence[Block]) -> Iterator[tuple[int, str, nn.Module]]:
    """(layer, name of its matrix or else of itself, module) of every router, those without parameters included."""
    modules = dict(unwrap(ctx.model).named_modules())
    seen = set()
    for p in ctx.placed:
        if p.role == "router" and p.layer is not None and p.fan_out == blocks[p.layer].experts:
            seen.add(module := modules[canonical(p.name).rpartition(".")[0]])
            yield p.layer, p.name, module
    layers = iter([i for i, block in enumerate(blocks) if block.experts])
    for name, module in modules.items():
        if isinstance(getattr(module, "kind", None), RouterKind):
            layer = next(layers, None)
            if layer is not None and module not in seen:
                yield layer, name, module


def _other_router(name: str, found: str, planned: str) -> Finding:
    return Finding(
        NAME,
        FAIL,
        name,
        f"the planned router, {planned}",
        f"router {found}",
        ("the model was built from another shape",),
        f'router = "{found}" in the target, or build the model from plan.target',
    )


@torch.no_grad()
def _run(module: nn.Module, width: int) -> Routed | None:
    """A router alone, on the CPU, with small random weights in place of its own; None where it wants more than hidden states."""
    if getattr(getattr(module, "kind", None), "needs_tokens", False):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone: Any = copy.deepcopy(module).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    for parameter in alone.parameters():
        # logits of std 0.3: apart, so that no two experts tie, and small, so that no score saturates; a gain is about 1
        drawn = torch.randn(parameter.shape, generator=generator) * 0.3 / width**0.5
        parameter.copy_(drawn if parameter.dim() > 1 else torch.ones(parameter.shape))
    for buffer in alone.buffers():
        # a balance bias of zero, as at the start of training
        buffer.zero_()
    if isinstance(common := getattr(alone, "common", None), nn.Module):
        _to_cpu(common)
    with evaluating(alone):
        out = alone(torch.randn(TOKENS, width, generator=generator))
    return out if isinstance(out, Routed) else None


def _to_cpu(common: nn.Module) -> None:
    """What a model's routers share is no part of any of them, and has to come along; on the meta device it has no values: zeros."""
    tensors = (*common.parameters(), *common.buffers())
    if not any(t.is_meta for t in tensors):
        common.cpu()
        return
    common.to_empty(device="cpu")
    for t in (*common.parameters(), *common.buffers()):
        t.zero_()


def _routing(ctx: Context, name: str, layer: int, routing: Routed, block: Block) -> Iterator[Finding]:
    """Experts per token, and weights that sum to R for every token (R·m1 where gates are measured)."""
    weight_TN = torch.zeros(routing.num_tokens, routing.num_experts + 1)
    weight_TN.index_put_((routing.token_P, routing.expert_P), routing.weight_P.float(), accumulate=True)
    total, active = weight_TN.sum(1), (weight_TN[:, :-1] != 0).sum(1).float()
    m = block.moments[0] if block.moments else 1.0
    wanted = ctx.plan.multipliers.route[layer] * m
    # how many a router by mass takes is its own affair: it differs by token, and by its buffers, which are zeroed here
    if block.router_kind.mean_active is None and float(active.mean()) != block.active:
        yield Finding(
            NAME,
            FAIL,
            name,
            f"{block.active} experts per token",
            number(float(active.mean())),
            ("the model's top-k is not the planned one",),
            f"build the router with top-k {block.active}",
        )
    spread = float(total.std())
    # in float32 a sum of normalised weights is exact to 1e-6, whatever the router
    if block.exact_sum and spread > 1e-3 * float(total.mean()):
        yield not_constant(name, float(total.mean()), spread, wanted)
    elif block.exact_sum and abs(float(total.mean()) - wanted) > 1e-3 * wanted:
        yield Finding(
            NAME,
            FAIL,
            name,
            f"weights that sum to R = {number(wanted)}",
            number(float(total.mean())),
            (
                "the route scale is missing, doubled, or outside the router as well",
                "normalised per group instead of over all active experts",
            ),
            "give the router the plan's R (route_scale) once",
        )


def _stock_routers(ctx: Context) -> Iterator[Finding]:
    """Routers of a stock family: what was observed of them on a tiny model with this config's switches."""
    if not is_stock(ctx.model) or (known := observe_stock(ctx.model).routing) is None:
        yield Finding(NAME, SKIP, measured="the routers could not be watched: give a batch")
        return
    names = several([p.name for p in ctx.placed if p.role == "router"], 1)
    wrong = list(_against_observed(ctx, known))
    yield from (Finding(NAME, FAIL, names, *fault) for fault in wrong)
    if known.normalised is None:
        mend = "give a batch, so that they can be measured"
        yield Finding(NAME, WARN, names, "weights that sum to one", known.advice, (), mend)
    elif not wrong:
        yield Finding(NAME, PASS, measured=f"observed on a tiny model of this config: {known.advice}")


def _against_observed(ctx: Context, known: Routers) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """(expected, measured, causes, mend) of what the plan says of the routers and a tiny model of the config does not do."""
    blocks = [b for b in ctx.plan.target.per_layer if b.experts]
    planned, scores = {b.active for b in blocks}, {b.router_kind.score for b in blocks} - {None}
    again = "plan again from mue inspect's shape"
    if {known.active} != planned:
        yield (
            f"{several(map(str, planned))} experts per token",
            str(known.active),
            ("planned for another top-k",),
            again,
        )
    if known.score is not None and scores and scores != {known.score}:
        yield (
            f"{several(map(str, sorted(map(str, scores))))} scores",
            f"{known.score} scores",
            ("planned for another router",),
            f'router = "{known.score}" in the target',
        )
    if not any(b.exact_sum for b in blocks):
        return
    if known.normalised is False:
        expected = "weights that sum to one over the active experts"
        yield expected, known.advice, ("the family does not renormalise, or its switch is off",), known.advice
    elif known.scale is not None:
        R = {r for r, b in zip(ctx.plan.multipliers.route, ctx.plan.target.per_layer, strict=True) if b.experts}
        # the observed scale is kept to four decimals (mue.layouts.transformers.shape)
        if any(abs(known.scale - r) > 1e-3 * r for r in R):
            wanted = f"weights that sum to R = {several(map(number, sorted(R)))}"
            yield wanted, number(known.scale), ("the config's own route scale is not the planned one",), known.advice


def not_constant(where: str, mean: float, spread: float, expected: float) -> Finding:
    """The weights of a router do not sum to one number for every token."""
    return Finding(
        NAME,
        FAIL,
        where,
        f"weights that sum to one number for every token ({number(expected)} with all multipliers)",
        f"mean {number(mean)}, spread {number(spread)}",
        (
            "the weights are not renormalised over the active experts (norm_topk_prob = false)",
            "renormalised over other experts than those that are used",
        ),
        'renormalise (norm_topk_prob = true), or plan with gates = "measured" and gate_moments',
    )
