"""Faults of the start: what is drawn, set, tied or declared otherwise than planned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mue.layouts.layout import ParamInfo, expert_slices
from support.wiring.case import FOLDED, Case
from support.wiring.fault import DOWN, EXPERTS, HEAD, MOE, ROUTER, both, fault, named, scale, unless

OTHER = 0.011  # a std that no tensor of these plans has


def experts_of(p: ParamInfo) -> list[Tensor]:
    """Views of a tensor's experts."""
    return [t for _, t in expert_slices(p)]


@fault(
    "wrong fan-in axis for fused experts",
    "init",
    named("expert_down"),
    both(MOE, unless(square="an expert's down projection is square")),
)
@torch.no_grad()
def _(c: Case) -> None:
    """The std of a down projection is that of its other axis."""
    for p in c.of("expert_down"):
        p.parameter.mul_(math.sqrt(p.fan_in / p.fan_out))


@fault("one expert of N left at default init", "init", named("expert_down", then=r"\[expert 5\]"), MOE)
@torch.no_grad()
def _(c: Case) -> None:
    """An expert that was built after init ran."""
    experts_of(c.of("expert_down")[-1])[5].normal_(std=OTHER)


@fault("experts missed by a name pattern", "init", named("expert_up", "expert_gate"), MOE)
@torch.no_grad()
def _(c: Case) -> None:
    """All experts have the start of the model's own code."""
    for p in c.of(*EXPERTS):
        p.parameter.normal_(std=OTHER)


@fault(
    "gate half of the feed-forward at default init",
    "init",
    named("ffn_gate", "expert_gate"),
    unless(not_gated="no gates"),
)
@torch.no_grad()
def _(c: Case) -> None:
    """Init reached the up half only."""
    for p in c.of("ffn_gate", "expert_gate"):
        if len(p.layout.parts) < 2:
            p.parameter.normal_(std=OTHER)
            continue
        at = next(i for i, part in enumerate(p.layout.parts) if part.endswith("gate"))
        axis = next(i for i, a in enumerate(p.layout.axes) if a == "out")
        p.parameter.chunk(2, axis)[at].normal_(std=OTHER)


@fault("router at default init", "init", named("router"), ROUTER)
@torch.no_grad()
def _(c: Case) -> None:
    """nn.Linear's own uniform start."""
    for p in c.of("router"):
        nn.init.kaiming_uniform_(p.parameter, a=5**0.5)


@fault("depth-scaled init on top", "init", named("attention_o"))
def _(c: Case) -> None:
    """GPT-2's 1/√(2L), which the folded multiplier already stands for."""
    scale(c, 0.5, "attention_o")


@fault("all experts from one draw", "init", named(*EXPERTS, then=r"\[expert 1\]"), MOE)
@torch.no_grad()
def _(c: Case) -> None:
    """The generator was seeded anew for every expert."""
    for p in c.of(*EXPERTS):
        first, *others = experts_of(p)
        for other in others:
            other.copy_(first)


@fault(
    "every layer from one seed",
    "init",
    named("attention_o", layer=-1),
    lambda t: "one attention output only" if t.layers < 2 else "",
)
@torch.no_grad()
def _(c: Case) -> None:
    """The generator was seeded anew for every layer."""
    first, *_, last = c.of("attention_o")
    last.parameter.copy_(first.parameter)


@fault("gains off by one", "init", named("norm"), unless(not_gains="its norms have no gains"))
@torch.no_grad()
def _(c: Case) -> None:
    """Gains of code that adds 1 start at 1, or those of code that does not at 0."""
    for p in c.of("norm"):
        p.parameter.add_(1.0 if p.layout.start == 0 else -1.0)


@fault("head drawn again after plan.init_", "init", named("head"), HEAD)
@torch.no_grad()
def _(c: Case) -> None:
    """The vocabulary was resized, or post_init ran last."""
    nn.init.kaiming_uniform_(c.of("head")[0].parameter, a=5**0.5)


@fault("embedding drawn with a width factor", "init", named("embedding"))
def _(c: Case) -> None:
    """The table's std follows the width."""
    scale(c, 2**-0.5, "embedding")  # r^-½: all targets are twice as wide as the base


@fault("down projections drawn without the expansion's root", "init", named(*DOWN))
def _(c: Case) -> None:
    """1/√ρ_e is missing."""
    scale(c, 0.73, *DOWN)


@fault(
    "unfolded init on a folded plan",
    "init",
    named("attention_o"),
    unless(not_residual="the plan's residual multiplier is 1"),
    FOLDED,
)
def _(c: Case) -> None:
    """The weights have the std of the plan with multipliers, which no code applies."""
    scale(c, 2.0, "attention_o")


@fault("head starts as a copy of the embedding", "init, tied weights", named("head"), HEAD)
@torch.no_grad()
def _(c: Case) -> None:
    """Tied at the start and free afterwards."""
    head, embedding = c.of("head")[0], c.of("embedding")[0]
    head.parameter.copy_(embedding.parameter)
