"""Faults of the training step, the plan, the declared layout, clipping and checkpoints."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import mue
from mue.fold import clip_grad_norm_, coefficients, fold
from mue.layouts.layout import Layout
from support.wiring.carried import Carried
from support.wiring.case import FOLDED, MULTIPLIERS, TUNED, Case
from support.wiring.fault import (
    EXPERTS,
    HEAD,
    MOE,
    ROUTER,
    TIED,
    around,
    both,
    fault,
    head_of,
    named,
    regroup,
    table_of,
    unless,
)
from support.wiring.faults_optimizer import ANY
from support.wiring.traits import same

CLIPS = unless(not_clips="the plan does not clip")


@fault("frozen experts", "coverage", named(*EXPERTS), MOE)
def _(c: Case) -> None:
    """requires_grad is off."""
    for p in c.of(*EXPERTS):
        p.parameter.requires_grad_(False)


@fault("experts computed from detached weights", "moved", named(*EXPERTS), MOE)
def _(c: Case) -> None:
    """The code reads .data."""
    for p in c.of(*EXPERTS):
        p.parameter.register_hook(torch.zeros_like)


@fault("one expert of N never trained", "moved", named(*EXPERTS, then=r"\[expert 0\]"), MOE)
def _(c: Case) -> None:
    """A loop over experts begins at one."""

    def hook(axis: int, size: int) -> Any:
        def zero(g: Tensor) -> Tensor:
            g = g.clone()
            g.narrow(axis, 0, size).zero_()
            return g

        return zero

    for p in c.of(*EXPERTS):
        axis = next(i for i, a in enumerate(p.layout.axes) if a.startswith("expert"))
        p.parameter.register_hook(hook(axis, p.parameter.shape[axis] // p.experts))


@fault("router under no_grad", "moved", named("router"), ROUTER)
def _(c: Case) -> None:
    """The scores carry no gradient."""
    for p in c.of("router"):

        def forward(old: Any, *args: Any) -> Any:
            with torch.no_grad():
                return old(*args)

        around(c.module(p), forward)


@fault(
    "bf16 parameters that never move",
    "moved",
    named("norm", "qk_norm", "final_norm"),
    unless(not_gains="its norms have no gains"),
)
def _(c: Case) -> None:
    """The step on a gain of 1 lies below half of what bf16 can tell apart."""
    # A step of Adam is about lr: 2.5e-4 is less than half of bf16's spacing below 1 (2^-8), so that gains stay at 1.
    c.plan = c.plan.retuned(lr=TUNED.lr / 16)
    c.low()
    c.checkpoint = None
    regroup(c, c.plan.param_groups(c.model))


@fault("queries detached", "moved", named("attention_q", "qk_norm"))
def _(c: Case) -> None:
    """A detach() between the projection and the softmax."""
    for p in c.of("attention_q"):
        around(c.module(p), lambda old, *a: old(*a).detach())


@fault(
    "router reads the stream before its norm",
    "multipliers, gates",
    named("router", "expert_down"),
    both(ROUTER, unless(not_prenorm="no norm before its feed-forward")),
)
def _(c: Case) -> None:
    """The router is handed what the norm before it was handed."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def norm(layer: int) -> Any:
        def keep(old: Any, x: Tensor) -> Tensor:
            out: Tensor = old(x)
            seen.setdefault(layer, []).append((x, out))
            return out

        return keep

    def route(layer: int) -> Any:
        def change(old: Any, x: Tensor, *rest: Any) -> Any:
            before = next((a for a, b in reversed(seen.get(layer, [])) if same(b, x)), None)
            seen.clear()
            return old(x * 3 if before is None else before.reshape(x.shape), *rest)

        return change

    for p in c.of("norm"):
        if p.layer is not None and p.name.endswith("weight") and not p.layout.after:
            around(c.module(p), norm(p.layer))
    for p in c.of("router"):
        if p.layer is not None and p.fan_out > 1:
            around(c.module(p), route(p.layer))


@fault("loss summed over tokens instead of averaged", "loss", r"^loss")
def _(c: Case) -> None:
    """Gradients are as many times as large as there are tokens."""

    def change(old: Any, *args: Any, **batch: Any) -> Any:
        out = old(*args, **batch)
        if out.loss is not None:
            out.loss = out.loss * 48
        return out

    around(c.model, change)


@fault("parameter stepped twice", "moved", ANY)
def _(c: Case) -> None:
    """Two optimizers, or two calls."""
    old = c.optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        old()
        old()

    c.optimizer.step = step  # type: ignore[method-assign]


@fault("weight decay applied by hand as well", "moved", ANY)
def _(c: Case) -> None:
    """The loop shrinks weights that the optimizer shrinks."""
    old = c.optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for p in c.model.parameters():
                p.mul_(1 - 1e-2)
        old()

    c.optimizer.step = step  # type: ignore[method-assign]


def head_name(c: Case) -> str:
    """What the module that makes the logits is called."""
    return re.escape(next(name for name, module in c.model.named_modules() if module is head_of(c)))


# ---- tied -------------------------------------------------------------------------------------------------------------------


@fault("tied head untied by a copy", "coverage, tied weights", lambda c: rf"head|tied|{head_name(c)}", TIED)
def _(c: Case) -> None:
    """A copy, a move or a load made two tensors of one."""
    head_of(c).weight = nn.Parameter(table_of(c).weight.detach().clone())  # type: ignore[union-attr, operator]


@fault("head tied where the plan has it apart", "coverage, tied weights", r"head|tied|model is not", HEAD)
def _(c: Case) -> None:
    """tie_weights() was called."""
    head_of(c).weight = table_of(c).weight


# ---- another plan, another layout ------------------------------------------------------------------------------------------


@fault("stale plan: another granularity", "coverage", r"down|up|gate|experts|w1|w2|v1|fc|c_proj|dense|\.mlp\.|ffn")
def _(c: Case) -> None:
    """The plan's feed-forwards are twice as wide."""
    target: Any = c.plan.target
    _replan(c, tuple(replace(b, ffn=b.ffn * 2) if b.ffn else replace(b, expert=b.expert * 2) for b in target.blocks))


@fault("stale plan: another number of layers", "coverage", r"layers|blocks|\.h\.|model is not")
def _(c: Case) -> None:
    """The plan has one layer."""
    target: Any = c.plan.target
    _replan(c, (replace(target.blocks[0], layers=1),))


def _replan(c: Case, kinds: tuple[Any, ...]) -> None:
    """The plan of another target than the model; the optimizer stays."""
    target, inputs = c.plan.target, c.plan.inputs
    same_in_both = ("width", "head_dim", "heads", "kv_heads", "sequence", "vocab", "tied", "gated")
    other = mue.Mixed(blocks=kinds, **{name: getattr(target, name) for name in same_in_both})
    runs: dict[str, Any] = {"base_training": inputs.base_training, "training": inputs.training}
    plan = mue.transfer(inputs.base, other, inputs.tuned, **runs, **inputs.options)
    c.plan = plan if c.plan.folding is None else fold(plan, c.plan.folding.route)
    c.checkpoint, c.clip = {"plan": c.plan.hash}, None


@fault(
    "stale plan: multipliers of another one",
    "coverage, multipliers",
    "multiplier|down|w2|fc|c_proj|dense|experts",
    form=MULTIPLIERS,
)
def _(c: Case) -> None:
    """The model was built from another plan's multipliers."""
    if c.ours:
        c.model.multipliers = replace(c.model.multipliers, output=tuple(0.7 * a for a in c.model.multipliers.output))  # type: ignore[union-attr, arg-type]
    for knob in c.knobs:
        knob.factors["another"] = 0.7


@fault("a parameter nobody planned", "coverage", r"extra")
def _(c: Case) -> None:
    """An adapter, or a head for another task, without a role."""
    c.model.extra = nn.Parameter(torch.zeros(3))  # type: ignore[assignment]


DECLARED = unless(ours="its layout is part of it", folded="the layout of stock code is observed, not declared")


def _redeclare(c: Case, change: Any) -> None:
    assert isinstance(c.model, Carried)
    c.model._rows = [change(row) for row in c.model._rows]


@fault(
    "declared: axes of the experts' down projections transposed",
    "coverage",
    named("expert_down"),
    both(MOE, DECLARED, unless(square="an expert's down projection is square")),
    MULTIPLIERS,
)
def _(c: Case) -> None:
    """The layout takes the stack for (expert, in, out), or the other way round."""
    other = {"in": "out", "out": "in", "expert*in": "expert*out", "expert*out": "expert*in", "expert": "expert"}

    def change(row: Layout) -> Layout:
        return replace(row, axes=tuple(other[a] for a in row.axes)) if row.role == "expert_down" else row

    _redeclare(c, change)


@fault(
    "declared: shared experts as a dense feed-forward",
    "coverage",
    r"shared|ffn|mlp",
    both(unless(not_shared="no shared expert"), DECLARED),
    MULTIPLIERS,
)
def _(c: Case) -> None:
    """A role of the wrong kind."""

    def change(row: Layout) -> Layout:
        roles = tuple(r.replace("shared_", "ffn_") for r in (row.role, *row.parts))
        return replace(row, role=roles[0], parts=roles[1:])

    _redeclare(c, change)


@fault("declared: a norm missing from the layout", "coverage", named("final_norm"), DECLARED, MULTIPLIERS)
def _(c: Case) -> None:
    """No row matches the final norm."""
    assert isinstance(c.model, Carried)
    c.model._rows = [row for row in c.model._rows if row.role != "final_norm"]


# ---- checkpoints and clipping ----------------------------------------------------------------------------------------------


@fault("checkpoint of another plan", "plan hash", r"checkpoint")
def _(c: Case) -> None:
    """It carries the hash of a plan with other rates."""
    c.checkpoint = {"plan": c.plan.scaled(2.0).hash}


@fault("checkpoint without a plan", "plan hash", r"checkpoint")
def _(c: Case) -> None:
    """It carries no hash."""
    c.checkpoint = {"step": 3}


@fault("folded gradients clipped by their plain norm", "clipping", r"clip", CLIPS, FOLDED)
def _(c: Case) -> None:
    """The norm counts folded gradients at 1/c of their size."""
    c.clip = lambda: nn.utils.clip_grad_norm_(c.model.parameters(), 1.0)


@fault("clipped per tensor", "clipping", r"weight|proj|clip|norm", CLIPS, FOLDED)
def _(c: Case) -> None:
    """Every tensor has a norm of its own."""

    def clip() -> None:
        for p in c.model.parameters():
            if p.grad is not None:
                nn.utils.clip_grad_norm_([p], 1.0)

    c.clip = clip


@fault("another clip threshold than the plan's", "clipping", r"clip", CLIPS, FOLDED)
def _(c: Case) -> None:
    """A quarter of it."""
    c.clip = lambda: clip_grad_norm_(c.model.parameters(), 0.25, coefficients=coefficients(c.plan, c.model))
