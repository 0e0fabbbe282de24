"""One training step, undone afterwards: did every parameter move, and by as much as AdamW with the planned values moves it?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch.optim import Optimizer

from mue.checks.adamw_step import first_step_fault
from mue.checks.context import Context
from mue.checks.optimizers import is_torchs_adamw, state_of
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, WARN, Finding, several
from mue.checks.rounding import decay_lost
from mue.checks.training_step import LOW, TensorStep, starts_at_zero, stepped, training_steps
from mue.layouts.layout import ParamInfo, expert_slices, pattern_of
from mue.layouts.transformers.idle import idle_in_family
from mue.rules.roles import ROLES

NAME = "moved"
LOST = 0.5  # share of elements whose step may vanish in rounding: with more, less than half of the planned step is made


@check_of(NAME, place=10, needs=("roles", "plan", "values", "batch"))
def moved(ctx: Context) -> Iterator[Finding]:
    """Every parameter has a gradient and moves, by a step of its planned size; experts without tokens are told apart."""
    optimizers = stepped(ctx)
    if not optimizers:
        yield Finding(NAME, SKIP, measured=f"give the optimizer: none is built here for {ctx.plan.tuned.optimizer}")
        return
    fresh = not any(state_of(o) for o in optimizers)
    steps = training_steps(ctx)
    decay = list(decay_lost(ctx))
    for finding in _not_finite(steps) or _findings(ctx, steps, optimizers, fresh):
        if finding.status != PASS or all(f.status != FAIL for f in decay):
            yield finding
    yield from decay


def _findings(ctx: Context, steps: list[TensorStep], optimizers: list[Optimizer], fresh: bool) -> Iterator[Finding]:
    """What the step showed. ``fresh``: the optimizer has no state yet, so that AdamW's first step is known exactly.

    Tensors whose step was lost in rounding are left out of the comparison of sizes: their fault has a name already.
    """
    still, warned, idle = _still(ctx, steps)
    lost = [(s, share) for s in steps if (share := _lost(s)) > LOST]
    exact = (
        fresh
        and not starts_at_zero(ctx)
        and all(is_torchs_adamw(o) for o in optimizers)
        and ctx.plan.tuned.optimizer == "adamw"
    )
    wrong = [
        f
        for s in steps
        if exact and not any(s is other for other, _ in lost) and (f := first_step_fault(ctx, s)) is not None
    ]
    left_out = [name for name in still if name.partition("[")[0] not in ctx.seen[0].used]
    still = [name for name in still if name not in left_out]
    if left_out:
        yield Finding(
            NAME,
            FAIL,
            several(left_out),
            "the forward pass uses it",
            f"{len(left_out)} tensors are in no product, norm, look-up or sum of the model's forward pass",
            (
                "a line of the forward pass is missing (a norm, a shared expert, positions)",
                "a copy is used in its place",
            ),
            f"use {left_out[0].partition('[')[0]} in forward, or take it out of the model and its layout",
        )
    if still:
        yield Finding(
            NAME,
            FAIL,
            several(still),
            "a gradient that is not zero",
            f"{len(still)} tensors or experts get none, though they are used",
            (
                "requires_grad = False",
                "detached, or computed under no_grad or from .data",
                "not part of the loss's graph: its result is dropped, or a copy of the tensor is used in its place",
            ),
            f"find the detach() or no_grad() between {still[0].partition('[')[0]} and the loss",
        )
    if lost:
        yield _lost_finding(lost)
    yield from _grouped(wrong)
    yield from warned
    if not (still or left_out or lost or wrong):
        text = f"{len(steps)} tensors moved" + (", each by its planned step" if exact else "")
        others = [p.name for p in ctx.placed if not ROLES[p.role].trained]
        text += f"; {idle} experts got no token of this batch (docs/rare-experts.md: their decay)" if idle else ""
        text += f"; {several(others)} stayed: moved by load, not by the optimizer" if others else ""
        yield Finding(NAME, PASS, measured=text)


# ---- what it shows ---------------------------------------------------------------------------------------------------------


def _not_finite(steps: list[TensorStep]) -> list[Finding]:
    """The one finding where something is not a number: all others would follow from it."""
    bad = [
        s.info.name
        for s in steps
        if not bool(s.change.isfinite().all()) or (s.gradient is not None and not bool(s.gradient.isfinite().all()))
    ]
    if not bad:
        return []
    return [
        Finding(
            NAME,
            FAIL,
            several(bad),
            "finite gradients and steps",
            "not finite after one step",
            ("a division by zero in the gates or a norm", "lr far too large", "float16 without loss scaling"),
            "torch.autograd.set_detect_anomaly(True)",
        )
    ]


def _still(ctx: Context, steps: list[TensorStep]) -> tuple[list[str], list[Finding], int]:
    """Names without a gradient that should have one, warnings for those that cannot, and how many experts were idle."""
    still: list[str] = []
    warned: list[Finding] = []
    choosing: list[str] = []
    idle: set[tuple[int | None, int]] = set()
    blocks = ctx.plan.target.per_layer
    moved = {(layer, expert) for s in steps for expert, _, live in _live(s) if live for layer in _layers(s.info)}
    for s in steps:
        p = s.info
        # A router that draws took other experts in this step than in the pass that was looked at.
        drawn = p.layer is not None and blocks[p.layer].experts > 0 and blocks[p.layer].router_kind.stochastic
        for expert, name, live in _live(s):
            if live:
                continue
            here = _layers(p)
            used = (here[0], expert) in moved if drawn else any(_has_tokens(ctx, layer, expert) for layer in here)
            if expert is not None and not used:
                idle.add((p.layer, expert))
            elif (
                p.role == "router" and p.layer is not None and blocks[p.layer].active == 1 and p.parameter.requires_grad
            ):
                warned.append(
                    Finding(
                        NAME,
                        WARN,
                        name,
                        "a gradient",
                        "none: with one active expert the normalised weight is always 1",
                        ("a = 1 with normalised gates",),
                        'at least 2 active experts, or gates = "measured" without renormalisation',
                    )
                )
            elif pattern_of(p.name) in idle_in_family(ctx.model):
                choosing.append(name)
            else:
                still.append(name)
    if choosing:
        warned.append(_choosing(choosing))
    return still, warned, len(idle)


def _choosing(names: list[str]) -> Finding:
    return Finding(
        NAME,
        WARN,
        several(names),
        "a gradient",
        f"{len(names)} get none in the family's own code: they choose what others see, and have a loss of their own, or none",
        ("an indexer of sparse attention",),
        "train them with their own loss, or leave them out of the optimizer: weight decay alone would move them",
    )


def _live(s: TensorStep) -> Iterator[tuple[int | None, str, bool]]:
    """(expert, name, has a gradient) of a tensor or of each expert in it."""
    p = s.info
    if s.gradient is not None and (p.layout.stacked > 1 or "expert" in p.layout.axes):
        like = replace(p, parameter=s.gradient)
        for expert, g in expert_slices(like):
            yield expert, p.name if expert is None else f"{p.name}[expert {expert}]", bool((g != 0).any())
        return
    live = s.gradient is not None and bool((s.gradient != 0).any())
    yield _own_expert(p), p.name, live


def _own_expert(p: ParamInfo) -> int | None:
    """Index of the expert whose own module this tensor is in."""
    return p.expert if ROLES[p.role].kind == "expert" else None


def _layers(p: ParamInfo) -> tuple[int | None, ...]:
    """The layers that read a tensor; None for what lies outside the blocks."""
    return p.layers or (None,)


def _has_tokens(ctx: Context, layer: int | None, expert: int | None) -> bool:
    """Whether an expert of a layer is used by the tokens that were looked at; True where that cannot be known."""
    if expert is None:
        return True
    c = ctx.parts.get(layer) if layer is not None else None
    if c is None or not c.fits or expert >= c.routed.shape[1]:
        return c is None
    return bool(c.active[:, expert].any())


def _lost(s: TensorStep) -> float:
    """Share of the elements with a gradient whose value did not change at all."""
    if s.gradient is None or not s.info.parameter.requires_grad:
        return 0.0
    pushed = s.gradient != 0
    count = int(pushed.sum())
    return float(((s.change == 0) & pushed).sum()) / count if count else 0.0


def _lost_finding(lost: list[tuple[TensorStep, float]]) -> Finding:
    low = lost[0][0].before.dtype
    rounding = low in LOW
    return Finding(
        NAME,
        FAIL,
        several([s.info.name for s, _ in lost]),
        "a step that changes the stored value",
        f"{100 * lost[0][1]:.0f} % of the elements of {lost[0][0].info.name} ({low}) stay what they were",
        (
            f"{low} has too few digits for this lr: the step is rounded away" if rounding else "lr is 0 in this group",
            "the parameter is in no optimizer, or in one that does not step",
        ),
        "keep float32 master weights (model.float() with autocast), or an optimizer with stochastic rounding"
        if rounding
        else "see groups",
    )


def _grouped(wrong: list[tuple[str, str, str]]) -> Iterator[Finding]:
    if wrong:
        name, expected, measured = wrong[0]
        yield Finding(
            NAME,
            FAIL,
            several([w[0] for w in wrong]),
            f"AdamW's first step with the planned lr, weight decay and eps: {expected} ({name})",
            measured,
            (
                "lr, weight decay or eps of the group are not the planned ones: see groups",
                "the parameter is stepped twice",
                "gradients are changed on their way (a hook, a scaler that was not unscaled)",
            ),
            "optimizer = torch.optim.AdamW(plan.param_groups(model))",
        )
