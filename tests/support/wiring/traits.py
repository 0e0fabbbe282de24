"""What decides which faults are possible in a case: facts about its model and its plan, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from mue.plan.fold import unfold
from mue.rules.roles import ROLES
from support.wiring.carried import Carried
from support.wiring.case import FOLDED, ROUTED, Case


@dataclass(frozen=True)
class Traits:
    """Of one case.

    Attributes:
        ours: the lab's own model. folded: the multipliers are in the weights; ``routed``: but for R. tied: head and embedding are one.
        experts, shared, dense: some layer has routed experts; a shared one; a dense feed-forward.
        gated: feed-forwards have a gate. groups: the router picks from groups of experts. own_scores: gates that the plan measured.
        bias: the router has a balance bias. router: it has a matrix. clips: the plan clips.
        scaled: the attention's code has a number for its scale; ``own_queries``: q is a tensor of its own.
        rescaled: the planned attention scale is not 1/√head_dim.
        gains: there are norms with gains inside the blocks. ended_attention, ended_ffn: a norm ends that branch.
        residual, A, R, head: the multiplier differs from 1. expansion: a down projection's planned std is not the dense base's.
        prenorm: a norm stands before the branches.
        stacked: a tensor holds several experts. fused: a hidden matrix lies in one tensor with another.
        layers: blocks with an attention output of their own. biases: some projections have biases.
    """

    ours: bool
    folded: bool
    routed: bool
    tied: bool
    experts: bool
    shared: bool
    dense: bool
    gated: bool
    groups: bool
    own_scores: bool
    bias: bool
    router: bool
    clips: bool
    scaled: bool
    own_queries: bool
    rescaled: bool
    gains: bool
    ended_attention: bool
    ended_ffn: bool
    residual: bool
    A: bool
    R: bool
    head: bool
    prenorm: bool
    layers: int
    square: bool
    stacked: bool
    fused: bool


def traits_of(c: Case) -> Traits:
    """The facts of a right case."""
    params = list(c.of(*ROLES))
    roles = {r for p in params for r in (p.role, *p.layout.parts)}
    by_pattern = {p.layout.pattern: p for p in params}
    ended = {by_pattern[a].layout.role for p in params for a in p.layout.after}
    parts = {ROLES[r].part for r in ended}
    plan, blocks = unfold(c.plan), c.plan.target.blocks
    m = plan.multipliers
    q = [p for p in params if p.role == "attention_q"]
    downs = [p for p in params if p.role == "expert_down"]
    return Traits(
        ours=c.ours,
        folded=c.form in (FOLDED, ROUTED),
        routed=c.form == ROUTED,
        tied=c.plan.target.tied,
        experts="expert_down" in roles,
        shared="shared_down" in roles,
        dense="ffn_down" in roles,
        gated=bool(roles & {"ffn_gate", "expert_gate", "shared_gate"}),
        groups=any(b.groups > 1 for b in blocks),
        own_scores=any(b.gate_moments is not None for b in blocks),
        bias="router_bias" in roles or any("correction_bias" in n for n, _ in c.model.named_buffers()),
        router="router" in roles,
        clips=c.clip is not None,
        scaled=_scaled(c.model),
        own_queries=bool(q) and not any(p.layout.parts for p in q),
        rescaled=not math.isclose(plan.attention_scale, plan.target.head_dim**-0.5),
        gains="norm" in roles and any(p.role == "norm" and p.layout.start in (0, 1, None) for p in params),
        ended_attention="o" in parts,
        ended_ffn="down" in parts,
        residual=m.residual != 1,
        A=any(a != 1 for a in m.output),
        R=any(r != 1 for r in m.route),
        head=m.head != 1,
        prenorm=any(p.role == "norm" and not p.layout.after for p in params),
        layers=len([p for p in params if p.role == "attention_o"]),
        square=all(p.fan_in == p.fan_out for p in downs),
        stacked=any(p.layout.stacked > 1 or "expert" in p.layout.axes for p in downs),
        fused=any(ROLES[p.role].hidden and p.layout.parts for p in params),
    )


def _scaled(model: nn.Module) -> bool:
    inner = model.stock if isinstance(model, Carried) else model
    numbers = [getattr(m, "scaling", None) or getattr(m, "scale", None) for m in inner.modules()]
    return any(isinstance(x, float) for x in numbers)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two activations hold the same numbers, in whatever shape."""
    return a.numel() == b.numel() and bool(torch.equal(a.detach().reshape(-1), b.detach().reshape(-1)))
