# ruff: noqa: N815 (shape suffixes in field names)
"""Do the gates keep the rule's promise: a experts per token, weights that sum to one before R, F near 1?

Statically (shapes only, also on the meta device) the routers themselves are run at full size on random tokens; with a
batch the weights are read off the branches' outputs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mue.checks.branches import Branch, Coefficients
from mue.checks.context import Context, evaluating
from mue.checks.report import FAIL, PASS, SKIP, WARN, Finding, several
from mue.checks.subjects.multipliers import expected_routed
from mue.layouts.layout import HasLayout, canonical, unwrap
from mue.shapes.block import MEASURED, Block
from mue.shapes.routers import RouterKind
from mue.util.text import number

NAME = "gates"
VARIANCE = 1.25  # F above which the branch's init scale is off by more than a tenth
TOKENS = 128
SCORES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "softmax": lambda logits: logits.softmax(-1)}


@runtime_checkable
class Routed(Protocol):
    """What a router returns, as far as it is read here: mue.moe's Routing, or anything with the same fields."""

    token_P: Tensor
    expert_P: Tensor
    weight_P: Tensor
    num_tokens: int
    num_experts: int


# ---- from the outputs -------------------------------------------------------------------------------------------------------


def gates(ctx: Context) -> Iterator[Finding]:
    """Number of experts per token, constant sum, F, and the weights against the router's own scores (C12, conventions 9)."""
    blocks, read, found = ctx.plan.target.per_layer, 0, []
    for b in ctx.branches:
        c = ctx.parts.get(b.layer)
        if b.kind != "feed-forward" or not blocks[b.layer].experts or c is None or not c.fits:
            continue
        read += 1
        found += list(_layer(ctx, b, c, blocks[b.layer]))
    yield from found
    if not any(block.experts for block in blocks):
        yield Finding(NAME, PASS, measured="no routers")
    elif not read:
        yield Finding(NAME, SKIP, measured="the weights could not be read off the branches: see multipliers")
    elif not any(f.status == FAIL for f in found):
        yield Finding(NAME, PASS, measured=f"{read} routers: weights sum to R, F near 1")


def _layer(ctx: Context, b: Branch, c: Coefficients, block: Block) -> Iterator[Finding]:
    router = next(
        (p for p in ctx.placed if p.layer == b.layer and p.role == "router" and p.fan_out == block.experts), None
    )
    where = router.name if router else f"blocks {b.layer} router"
    active = c.active.sum(1)
    if float(active.float().mean()) != block.active:
        yield Finding(
            NAME,
            FAIL,
            where,
            f"{block.active} experts per token",
            f"{number(float(active.float().mean()))}",
            ("the model's top-k is not the planned one", "tokens over capacity are dropped"),
            f"build the router with top-k {block.active}, or plan for what it has",
        )
        return
    total = c.routed.sum(1)
    mean, spread = float(total.mean()), float(total.std(correction=0)) if total.numel() > 1 else 0.0
    if block.gates != MEASURED and spread > ctx.tolerance * abs(mean):
        yield _not_constant(where, mean, spread, expected_routed(ctx, b.layer))
        return
    F = float(block.active * c.routed.square().sum(1).mean() / mean**2)
    planned = block.gate_variance
    if VARIANCE * planned < F:
        yield Finding(
            NAME,
            FAIL,
            where,
            f"F = a·E[Σw²]/E[Σw]² near {number(planned)}",
            f"F = {number(F)}",
            (
                "the router's init is too large, so that its weights are far from even",
                "a softmax router where the plan has a sigmoid one",
            ),
            'plan.init_(model), or plan with gates = "measured" and gate_moments',
        )
    yield from _against_scores(ctx, b, c, block, where)


def _not_constant(where: str, mean: float, spread: float, expected: float) -> Finding:
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


def _against_scores(ctx: Context, b: Branch, c: Coefficients, block: Block, where: str) -> Iterator[Finding]:
    """The relative weights must be the planned scores of the router's own logits, or all equal for a router without scores."""
    kind = block.router_kind
    if block.gates == MEASURED or block.active < 2:
        return
    mine = c.routed / c.routed.sum(1, keepdim=True)
    bound = max(5e-3, 2 * ctx.tolerance)
    if kind.score is None:
        off = _distance(mine, c.active / block.active)
        if kind.unit_sum and off > bound:
            yield Finding(
                NAME,
                FAIL,
                where,
                f"equal weights, 1/{block.active} each, of the {kind.name} router",
                f"weights that differ from them by up to {100 * off:.2g} %",
                ("the model's router has scores",),
                "build the planned router, or plan with the model's own",
            )
        return
    product = b.last("router")
    logits = None if product is None else product.out.reshape(-1, product.out.shape[-1])
    if logits is None or logits.shape[1] != block.experts or logits.shape[0] != b.out.shape[0]:
        return
    logits = logits[: c.routed.shape[0]].double()
    distance = {score: _distance(mine, _weights(score, logits, c.active)) for score in SCORES}
    if distance[kind.score] <= bound:
        return
    other = next((score for score, d in distance.items() if d <= bound), None)
    yield Finding(
        NAME,
        FAIL,
        where,
        f"weights in proportion to the {kind.score} scores of this router",
        f"weights of {other} scores" if other else f"weights that differ by up to {100 * distance[kind.score]:.2g} %",
        (
            f"the router scores with {other}" if other else "normalised per group instead of over all active experts",
            "the balance bias is in the weights, not only in the selection",
            "the experts are in another order than the router's rows",
        ),
        f'router = "{other}" in the target, or the planned score in the router'
        if other
        else "w = score[picked] / score[picked].sum()",
    )


def _weights(score: str, logits: Tensor, active: Tensor) -> Tensor:
    picked = SCORES[score](logits) * active
    return picked / picked.sum(1, keepdim=True).clamp(min=1e-300)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.max())


# ---- from the routers alone -----------------------------------------------------------------------------------------------


def static_gates(ctx: Context) -> Iterator[Finding]:
    """The routers, run at their full size on random tokens; a stock family's at a tiny size with the config's switches."""
    if not any(b.experts for b in ctx.plan.target.per_layer):
        yield Finding(NAME, PASS, measured="no routers")
        return
    if isinstance(unwrap(ctx.model), HasLayout):
        yield from _own_routers(ctx)
    else:
        yield from _stock_routers(ctx)


def _own_routers(ctx: Context) -> Iterator[Finding]:
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
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 / width**0.5)
    for buffer in alone.buffers():
        buffer.zero_()
    with evaluating(alone):
        out = alone(torch.randn(TOKENS, width, generator=generator))
    return out if isinstance(out, Routed) else None


def _routing(ctx: Context, name: str, layer: int, routing: Routed, block: Block) -> Iterator[Finding]:
    weight_TN = torch.zeros(routing.num_tokens, routing.num_experts + 1)
    weight_TN.index_put_((routing.token_P, routing.expert_P), routing.weight_P.float(), accumulate=True)
    total, active = weight_TN.sum(1), (weight_TN[:, :-1] != 0).sum(1).float()
    m = block.gate_moments[0] if block.gate_moments else 1.0
    wanted = ctx.plan.multipliers.route[layer] * m
    if float(active.mean()) != block.active:
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
    if block.gates != MEASURED and spread > 1e-3 * float(total.mean()):
        yield _not_constant(name, float(total.mean()), spread, wanted)
    elif block.gates != MEASURED and abs(float(total.mean()) - wanted) > 1e-3 * wanted:
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
    from mue.layouts.transformers.stock import is_stock, stock

    if not is_stock(ctx.model) or (known := stock(ctx.model).routing) is None:
        yield Finding(NAME, SKIP, measured="the routers could not be watched: give a batch")
        return
    names = several([p.name for p in ctx.placed if p.role == "router"], 1)
    planned = {b.active for b in ctx.plan.target.per_layer if b.experts}
    measured = all(b.gates == MEASURED for b in ctx.plan.target.per_layer if b.experts)
    if {known.active} != planned:
        yield Finding(
            NAME,
            FAIL,
            names,
            f"{several(map(str, planned))} experts per token",
            str(known.active),
            ("planned for another top-k",),
            "plan again from mue inspect's shape",
        )
    elif known.normalised is None:
        yield Finding(
            NAME, WARN, names, "weights that sum to one", known.advice, (), "give a batch, so that they can be measured"
        )
    elif not known.normalised and not measured:
        yield Finding(
            NAME,
            FAIL,
            names,
            "weights that sum to one over the active experts",
            known.advice,
            ("the family does not renormalise, or its switch is off",),
            known.advice,
        )
    else:
        yield Finding(NAME, PASS, measured=f"observed on a tiny model of this config: {known.advice}")
