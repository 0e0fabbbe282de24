"""Faults of the forward pass: multipliers, stream, head, attention, gate and up."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.rules.roles import ROLES
from support.wiring.case import FOLDED, MULTIPLIERS, OURS, Case
from support.wiring.fault import (
    DOWN,
    MOE,
    SHARED,
    SPLIT,
    TIED,
    around,
    blocks,
    both,
    branch_end,
    fault,
    head_of,
    named,
    regroup,
    table_of,
    times,
    turn,
    unless,
    writers,
)

H, T = OURS
A = both(unless(not_A="the plan's output multipliers are 1"), SPLIT)
RESIDUAL = unless(not_residual="the plan's residual multiplier is 1")
R = both(MOE, unless(not_R="the plan's route scales are 1"))
HEADED = unless(not_head="the plan's head multiplier is 1")
OURS_ONLY = unless(not_ours="the code of a stock block cannot be changed from outside")
O_BRANCH = branch_end("attention_o")

# ---- branches --------------------------------------------------------------------------------------------------------------


def _branch(c: Case, factor: float, last: bool = False) -> None:
    """Multiply the whole feed-forward branches of the lab's own model."""
    for b in blocks(c)[-1 if last else 0 :]:
        times(b.ffn if b.ffn is not None else b.moe, factor)


def _output(c: Case, power: float, last: bool = False) -> None:
    """A to a power."""
    turn(c, "A", power, last=last)
    if c.ours:
        for i, b in enumerate(blocks(c)):
            branch = b.ffn if b.ffn is not None else b.moe
            if not last or i == len(blocks(c)) - 1:
                branch.output_multiplier **= power


@fault("output multiplier missing", "multipliers", named(*DOWN), A, MULTIPLIERS)
def _(c: Case) -> None:
    """A is applied nowhere."""
    _output(c, 0)


@fault("output multiplier doubled", "multipliers", named(*DOWN), A, MULTIPLIERS)
def _(c: Case) -> None:
    """A is applied twice."""
    _output(c, 2)


@fault("output multiplier missing in one layer", "multipliers", named(*DOWN, layer=-1), A, MULTIPLIERS)
def _(c: Case) -> None:
    """A is applied in every layer but the last."""
    _output(c, 0, last=True)


@fault("a folded output multiplier applied in the forward pass too", "multipliers", named(*DOWN), A, FOLDED)
def _(c: Case) -> None:
    """A is in the weights and in the code."""
    for module in writers(c, "ffn", "shared", "expert"):
        times(module, 0.5)


@fault(
    "output multiplier on the routed sum only",
    "multipliers",
    named("shared_down"),
    both(SHARED, unless(not_A="the plan's output multipliers are 1")),
    MULTIPLIERS,
)
def _(c: Case) -> None:
    """A misses the shared experts."""
    turn(c, "A", 0, ("shared",))
    if not c.ours:
        return
    for b in (block.moe for block in blocks(c)):
        b.shared_down = nn.Parameter(b.shared_down / b.output_multiplier)
        around(b, _unscale_shared)
    regroup(c, c.plan.param_groups(c.model))
    with torch.no_grad():
        for b in (block.moe for block in blocks(c)):
            b.shared_down.mul_(b.output_multiplier)


def _shared(b: Any, x: Tensor) -> Tensor:
    y: Tensor = (F.silu(x @ b.shared_gate.T) * (x @ b.shared_up.T)) @ b.shared_down.T
    return y


def _unscale_shared(old: Any, x: Tensor) -> Any:
    y, routing = old(x)
    return y + _shared(old.__self__, x) * (1 - old.__self__.output_multiplier), routing


def _route(c: Case, power: float) -> None:
    turn(c, "R", power)
    if c.ours:
        for b in blocks(c):
            b.moe.router.route_scale **= power


@fault("route scale missing", "multipliers", named("expert_down", "router"), R, MULTIPLIERS)
def _(c: Case) -> None:
    """R is applied nowhere."""
    _route(c, 0)


@fault("route scale doubled", "multipliers", named("expert_down", "router"), R, MULTIPLIERS)
def _(c: Case) -> None:
    """R is applied twice."""
    _route(c, 2)


@fault("route scale in the weights and in the model", "multipliers", named("expert_down", "router"), R, FOLDED)
def _(c: Case) -> None:
    """R is folded, or the config's own, and the code applies it again."""
    for module in writers(c, "expert"):
        times(module, float(max(b.active for b in c.plan.target.blocks)))


@fault("shared expert scaled by R", "multipliers", named("shared_down"), both(SHARED, R))
def _(c: Case) -> None:
    """R reaches the shared experts, too."""
    for module in writers(c, "shared") if not c.ours else ():
        times(module, 2.0)
    for b in blocks(c) if c.ours else ():
        around(b.moe, _scale_shared)


def _scale_shared(old: Any, x: Tensor) -> Any:
    y, routing = old(x)
    b = old.__self__
    return y + _shared(b, x) * b.output_multiplier * (b.router.route_scale - 1), routing


def _residual(c: Case, power: float) -> None:
    turn(c, "residual", power)
    for b in blocks(c) if c.ours else ():
        b.residual **= power


@fault("residual multiplier missing", "multipliers", O_BRANCH, RESIDUAL, MULTIPLIERS)
def _(c: Case) -> None:
    """l^-α is applied nowhere."""
    _residual(c, 0)


@fault("residual multiplier doubled", "multipliers", O_BRANCH, RESIDUAL, MULTIPLIERS)
def _(c: Case) -> None:
    """l^-α is applied twice."""
    _residual(c, 2)


@fault("residual multiplier missing on the feed-forward only", "multipliers", branch_end(*DOWN), RESIDUAL, MULTIPLIERS)
def _(c: Case) -> None:
    """l^-α reaches attention alone."""
    if c.ours:
        _branch(c, 1 / c.plan.residual_multiplier)
        return
    ends = {
        id(c.module(p))
        for p in c.of("norm")
        if any(ROLES[q.role].part == "down" for q in c.of(*DOWN) if q.layout.pattern in p.layout.after)
    }
    turn(c, "residual", 0, ("ffn", "shared", "expert"))
    for p in c.of("norm"):
        if p.layout.after and id(c.module(p)) in ends:
            times(c.module(p), 1 / c.plan.residual_multiplier)


@fault(
    "residual multiplier on the stream instead of the branch",
    "multipliers",
    r"attention\.o|residual stream",
    OURS_ONLY,
    MULTIPLIERS,
)
def _(c: Case) -> None:
    """l^-α shrinks what a block is given and not what it adds."""

    def forward(self: Any, x: Tensor) -> Any:
        x = x * self.residual + self.attention(self.attention_norm(x))
        y, routing = self.ffn_norm(x), None
        if self.ffn is not None:
            y = self.ffn(y)
        else:
            y, routing = self.moe(y)
        return x * self.residual + y, routing

    for b in blocks(c):
        b.forward = types.MethodType(forward, b)


@fault("residual multiplier on a whole block", "multipliers", r"residual stream|embed|wte")
def _(c: Case) -> None:
    """A factor multiplies what each block returns, the stream with the branches."""
    for module in c.layers():
        times(module, 0.5)


@fault("a folded residual multiplier applied in the forward pass too", "multipliers", O_BRANCH, RESIDUAL, FOLDED)
def _(c: Case) -> None:
    """l^-α is in the weights and in the code."""
    ends = [c.module(p) for p in c.of("norm") if any(q.layout.pattern in p.layout.after for q in c.of("attention_o"))]
    for module in ends or writers(c, "attention"):
        times(module, 0.5)


# ---- head and embedding --------------------------------------------------------------------------------------------------------

LOGITS = named("head", "embedding")


@fault("head multiplier dropped", "multipliers", LOGITS, HEADED, MULTIPLIERS)
def _(c: Case) -> None:
    """Logits are not multiplied."""
    turn(c, "head", 0)
    if c.ours:
        times(c.model.final_norm, 1 / c.plan.head_multiplier)  # type: ignore[arg-type]


@fault("head multiplier doubled", "multipliers", LOGITS)
def _(c: Case) -> None:
    """Logits are multiplied once more."""
    times(head_of(c), 0.5)


@fault("head multiplier only where no targets are given", "multipliers", LOGITS, HEADED, MULTIPLIERS)
def _(c: Case) -> None:
    """The loss is that of logits without a multiplier; generation has it."""
    training = [False]

    def call(old: Any, *args: Any, **batch: Any) -> Any:
        training[0] = "labels" in batch or len(args) > 1
        return old(*args, **batch)

    around(c.model, call)
    around(head_of(c), lambda old, x: old(x / c.plan.head_multiplier if training[0] else x))


@fault("tied embedding scaled twice", "multipliers", named("embedding"), both(TIED, HEADED), MULTIPLIERS)
def _(c: Case) -> None:
    """The head's multiplier is applied to the table's look-ups as well."""
    times(table_of(c), c.plan.head_multiplier)


@fault("embedding multiplied by its width's root", "multipliers", named("embedding"))
def _(c: Case) -> None:
    """What enters the stream is multiplied by a factor of the width."""
    times(table_of(c), 7.0)
