"""Faults of routers: what the experts are handed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.moe.routing import Routing
from support.wiring.case import Case
from support.wiring.families import handed
from support.wiring.fault import ROUTED_SUM, ROUTER, around, blocks, both, fault, named, scale, unless

Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
GATE = named("router")
# What is measured of gates that do not sum to one is their number and size; how they come about is the family's own.
NORMALISED = unless(own_scores="the plan takes its gates as measured, whatever made them")
WEIGHED = both(ROUTER, NORMALISED)


def rewire(c: Case, change: Change) -> None:
    """Replace what experts are handed: ``change(logits (T, N), index (T, K), weights (T, K)) -> (index, weights)``."""
    if c.ours:
        for b in blocks(c):
            around(b.moe.router, lambda old, x, change=change: _ours(old, x, change))
        return
    for layer, module in c.experts().items():
        seen: dict[str, Tensor] = {}
        p = next(p for p in c.of("router") if p.layer == layer and p.fan_out == c.plan.target.per_layer[layer].experts)
        around(c.module(p), lambda old, x, *rest, seen=seen: (seen.__setitem__("x", x), old(x, *rest))[1])

        def forward(old: Any, *args: Any, seen: dict[str, Tensor] = seen, p: Any = p) -> Any:
            at = handed(args)
            assert at is not None
            i, w = at
            x = seen["x"].reshape(-1, seen["x"].shape[-1])
            given = list(args)
            given[i], weights = change(F.linear(x.to(p.parameter.dtype), p.parameter).float(), args[i], args[w])
            given[w] = weights.to(args[w].dtype)
            return old(*given)

        around(module, forward)


def _ours(old: Any, x: Tensor, change: Change) -> Any:
    out = old(x)
    assert isinstance(out, Routing)
    index = out.expert_P.view(out.num_tokens, -1)
    logits = F.linear(x.reshape(-1, x.shape[-1]), old.__self__.weight)
    index, weights = change(logits, index, out.weight_P.view(index.shape))
    return Routing.from_topk(index, weights, out.num_experts, route_scale=out.route_scale)


def reweigh(c: Case, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    rewire(c, lambda logits, index, w: (index, change(logits, index, w)))


def _sum(w: Tensor) -> Tensor:
    return w.sum(1, keepdim=True)


@fault("softmax without renormalisation", "gates, multipliers", ROUTED_SUM, WEIGHED)
def _(c: Case) -> None:
    """Gates are softmax scores over all experts, so that the active ones sum to a/N."""
    reweigh(c, lambda logits, index, w: logits.softmax(1).gather(1, index) * _sum(w))


@fault("sigmoid without renormalisation", "gates, multipliers", ROUTED_SUM, WEIGHED)
def _(c: Case) -> None:
    """Gates are sigmoid scores as they are."""
    reweigh(c, lambda logits, index, w: logits.sigmoid().gather(1, index) * _sum(w))


@fault("scores of the other kind", "gates", GATE, WEIGHED)
def _(c: Case) -> None:
    """Sigmoid in place of softmax, or the other way round, renormalised."""
    softmax = next(b.router for b in c.plan.target.blocks if b.experts) == "softmax"

    def change(logits: Tensor, index: Tensor, w: Tensor) -> Tensor:
        picked = logits.gather(1, index)
        other = picked.sigmoid() if softmax else (picked - picked.amax(1, keepdim=True)).exp()
        return other / _sum(other) * _sum(w)

    reweigh(c, change)


@fault(
    "renormalised per group instead of globally",
    "gates, multipliers",
    ROUTED_SUM,
    both(WEIGHED, unless(not_groups="experts are not picked from groups")),
)
def _(c: Case) -> None:
    """Every group of experts sums to one, so that the sum is the number of groups."""
    groups = next(b.groups for b in c.plan.target.blocks if b.experts)

    def change(logits: Tensor, index: Tensor, w: Tensor) -> Tensor:
        grouped = w.view(w.shape[0], groups, -1)
        return (grouped / grouped.sum(2, keepdim=True)).reshape(w.shape) * _sum(w)

    reweigh(c, change)


@fault("gates applied twice", "gates, multipliers", ROUTED_SUM, WEIGHED)
def _(c: Case) -> None:
    """Inputs and outputs of experts are both weighed."""
    reweigh(c, lambda logits, index, w: w * w / _sum(w))


@fault("gates not applied: every active expert counts 1/a", "gates", GATE, WEIGHED)
def _(c: Case) -> None:
    """The weights are even, whatever the router says."""
    reweigh(c, lambda logits, index, w: torch.ones_like(w) * _sum(w) / w.shape[1] + 0 * w)


@fault("balance bias in the weights", "gates", GATE, both(WEIGHED, unless(not_bias="no balance bias")))
def _(c: Case) -> None:
    """The bias that should only choose experts also weighs them."""
    softmax = next(b.router for b in c.plan.target.blocks if b.experts) == "softmax"

    def change(logits: Tensor, index: Tensor, w: Tensor) -> Tensor:
        score = logits.softmax(1) if softmax else logits.sigmoid()
        picked = (score + torch.linspace(0, 0.6, logits.shape[1])).gather(1, index)
        return picked / _sum(picked) * _sum(w)

    reweigh(c, change)


@fault("one expert fewer per token", "gates", GATE, ROUTER)
def _(c: Case) -> None:
    """The last of the chosen experts is dropped."""

    def change(logits: Tensor, index: Tensor, w: Tensor) -> Tensor:
        kept = torch.cat([w[:, :-1], torch.zeros_like(w[:, -1:])], 1)
        return kept / _sum(kept) * _sum(w)

    reweigh(c, change)


@fault(
    "one expert more per token",
    "gates",
    GATE,
    both(ROUTER, unless(ours="the lab's routers are built from the plan's shape")),
)
def _(c: Case) -> None:
    """The model's top-k is larger than the planned one."""

    def change(logits: Tensor, index: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        left = logits.scatter(1, index, float("-inf"))
        more, total = left.argmax(1, keepdim=True), _sum(w)
        w = torch.cat([w, w[:, -1:] * 0.9], 1)
        return torch.cat([index, more], 1), w / _sum(w) * total

    rewire(c, change)


@fault("experts in another order than the router's rows", "gates", GATE, WEIGHED)
def _(c: Case) -> None:
    """Each token reaches the expert after the one that its router chose."""
    rewire(c, lambda logits, index, w: ((index + 1) % logits.shape[1], w))


@fault("router far too large at the start", "init, gates", GATE, ROUTER)
def _(c: Case) -> None:
    """Logits are so far apart that one expert takes all the weight."""
    scale(c, 60.0, "router")
