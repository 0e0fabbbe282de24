"""Do the gates keep the rule's promise: a experts per token, weights that sum to one before R, F near 1?

With a batch the weights are read off the branches' outputs. With shapes only (also on the meta device) the routers
themselves are run at full size on random tokens: :mod:`mue.checks.routers_alone`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mue.checks.branches import Branch, fit_ratio
from mue.checks.context import Context
from mue.checks.readings import expected_routed
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, UNMEASURED, WARN, Finding
from mue.checks.routers_alone import NAME, not_constant, routers_alone
from mue.checks.solve import Coefficients
from mue.shapes.block import Block
from mue.util.text import number

# F above which the branch's init scale √F is off by more than a tenth. Logits of std 1 give sigmoid gates 1.00 to 1.01,
# renormalised softmax ones 1.1 to 1.2 (docs/why/index.md#gates).
VARIANCE = 1.25
SCORES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "softmax": lambda logits: logits.softmax(-1)}


@check_of(NAME, place=9, needs=("roles", "values", "batch"), otherwise=routers_alone)
def gates(ctx: Context) -> Iterator[Finding]:
    """Experts per token, constant sum, F, and the weights against the router's own scores (docs/why/index.md#gates)."""
    blocks, found = ctx.plan.target.per_layer, []
    wanted = {i for i, block in enumerate(blocks) if block.experts}
    read: set[int] = set()
    for b in ctx.branches:
        c = ctx.parts.get(b.layer)
        if b.kind != "feed-forward" or b.layer not in wanted or c is None or not c.fits:
            continue
        read.add(b.layer)
        found += list(_layer(ctx, b, c, blocks[b.layer]))
    yield from found
    if not wanted:
        yield Finding(NAME, PASS, measured="no routers")
    elif read and not any(f.status == FAIL for f in found):
        yield Finding(NAME, PASS, measured=f"{len(read)} routers: weights sum to R, F near 1", count=len(read))
    if wanted - read:
        yield from _alone(ctx, sorted(wanted - read))


def _alone(ctx: Context, layers: list[int]) -> Iterator[Finding]:
    """Routers whose weights could not be read off their branches: run alone, as without a batch."""
    try:
        found = list(routers_alone(ctx))
    except Exception:  # a router that wants more than hidden states, whatever its own code then raises
        found = []
    if all(f.status in (SKIP, WARN) for f in found):
        why = "the weights could not be read off the branch, and the router could not be run alone"
        found = [Finding(NAME, UNMEASURED, f"blocks {i} router", "weights that sum to R", why) for i in layers]
    yield from found


def _layer(ctx: Context, b: Branch, c: Coefficients, block: Block) -> Iterator[Finding]:
    """One router by its branch's coefficients: how many experts, one sum for all tokens, how even the weights are."""
    router = next(
        (p for p in ctx.placed if p.layer == b.layer and p.role == "router" and p.fan_out == block.experts), None
    )
    where = router.name if router else f"blocks {b.layer} router"
    active = c.active.sum(1)
    # how many a router by mass takes is its own affair: it differs by token, and drifts
    if block.router_kind.mean_active is None and float(active.float().mean()) != block.active:
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
    if block.exact_sum and spread > ctx.tolerance * abs(mean):
        yield not_constant(where, mean, spread, expected_routed(ctx, b.layer, b.normed is not None))
        return
    # whatever the multipliers are: they cancel between numerator and denominator
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
    yield from _other_input(b, c, where)
    yield from _against_kind(ctx, b, c, block, where)


def _other_input(b: Branch, c: Coefficients, where: str) -> Iterator[Finding]:
    """A router must read what its experts read: after the norm, not before (some families give it a norm of its own)."""
    product = b.scores(c.routed.shape[1])
    if product is None or product.given.numel() != b.made.numel() or product.transposed:
        return
    given = product.given.reshape(b.made.shape)[: len(c.given)]
    # the stream as it was left, or, in blocks whose branches are added one after the other, what their norm was given
    streams = [b.added.before, *(p.normed.given for p in b.products[:1] if p.normed is not None)]
    rows = [t.reshape(b.made.shape)[: len(c.given)] for t in streams if t.numel() == b.made.numel()]
    apart = _distance(given.double(), c.given.double()) > 5e-2
    if apart and any(fit_ratio(given, stream)[1] < 5e-2 for stream in rows):
        yield Finding(
            NAME,
            FAIL,
            where,
            "the router reads what its experts read",
            "the stream, before the norm",
            ("the norm is inside the experts' branch only",),
            "router(norm(x)), and experts(norm(x))",
        )


def _against_kind(ctx: Context, b: Branch, c: Coefficients, block: Block, where: str) -> Iterator[Finding]:
    """The relative weights must be what the planned router makes of them: even, or in proportion to its scores."""
    if not block.exact_sum or block.active < 2:
        return
    # the largest difference over all tokens and experts, so wider than one multiplier; another score differs by more
    kind, bound = block.router_kind, max(5e-3, 2 * ctx.tolerance)
    mine = c.routed / c.routed.sum(1, keepdim=True)
    if kind.even and (off := _distance(mine, c.active / block.active)) > bound:
        yield Finding(
            NAME,
            FAIL,
            where,
            f"equal weights, 1/{block.active} each, of the {kind.name} router",
            f"weights that differ from them by up to {100 * off:.2g} %",
            ("the model's router has scores",),
            "build the planned router, or plan with the model's own",
        )
    if kind.score is not None:
        yield from _against_scores(b, c, kind.score, mine, bound, where)


def _against_scores(
    b: Branch, c: Coefficients, score: str, mine: Tensor, bound: float, where: str
) -> Iterator[Finding]:
    """Weights (T, N) against the planned score of the router's own logits."""
    product = b.scores(c.routed.shape[1])
    logits = None if product is None else product.out.reshape(-1, product.out.shape[-1])
    if logits is None or logits.shape[1] != c.routed.shape[1] or logits.shape[0] != b.out.shape[0]:
        return
    logits = logits[: c.routed.shape[0]].double()
    distance = {kind: _distance(mine, _weights(kind, logits, c.active)) for kind in SCORES}
    if distance[score] <= bound:
        return
    other = next((kind for kind, d in distance.items() if d <= bound), None)
    yield Finding(
        NAME,
        FAIL,
        where,
        f"weights in proportion to the {score} scores of this router",
        f"weights of {other} scores" if other else f"weights that differ by up to {100 * distance[score]:.2g} %",
        (
            f"the router scores with {other}" if other else "normalised per group instead of over all active experts",
            "the balance bias is in the weights, not only in the selection",
            "the experts are in another order than the router's rows",
            "a temperature or another factor on the router's logits",
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
