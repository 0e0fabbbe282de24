"""Is the weight decay of low-precision weights there at all? A shrink below half a step of bfloat16 is rounded away every time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mue.checks.context import Context
from mue.checks.optimizers import called, holds_its_own, state_of
from mue.checks.report import FAIL, UNMEASURED, Finding, several
from mue.checks.schedule import peak_rate
from mue.checks.training_step import LOW, kept_weights, undone
from mue.layouts.layout import ParamInfo
from mue.rules.roles import ROLES

NAME = "moved"
MEND = (
    "keep float32 weights (model.float() under autocast), or an optimizer with float32 masters or stochastic rounding"
)


def decay_lost(ctx: Context) -> Iterator[Finding]:
    """A failure where the planned decay of bf16 and fp16 weights vanishes; not measured where that cannot be seen.

    It is measured: a step with gradients of zero is the decay alone. Masters in the optimizer's state and stochastic rounding
    show in it, whatever they are called.
    """
    small = [(p, shrink) for p in ctx.placed if (shrink := _planned_shrink(ctx, p))]
    if not small:
        return
    kind = str(small[0][0].parameter.dtype).removeprefix("torch.")
    holders = {id(q): o for o in ctx.optimizers for g in o.param_groups for q in g["params"]}
    held = [(p, shrink) for p, shrink in small if id(p.parameter) in holders]
    if not held:
        what = called(ctx.optimizers[0]) if ctx.optimizers else "no optimizer was given"
        why = f"{what}: whether it keeps float32 master weights is not seen"
        if not ctx.optimizers or any(holds_its_own(o) for o in ctx.optimizers):
            yield _unmeasured(small, kind, why)
        return
    used = {id(o): o for o in holders.values()}
    begun = any(state_of(o) for o in used.values())
    lost = _begun(ctx, held) if begun else _fresh(ctx, held)
    if not lost:
        return
    blind = next((o for o in used.values() if begun and not type(o).__module__.startswith("torch.optim.")), None)
    if blind is not None:
        yield _unmeasured(small, kind, f"{called(blind)} has a state already, and no master weights in it")
        return
    yield _finding(lost, kind)


def _unmeasured(small: list[tuple[ParamInfo, float]], kind: str, why: str) -> Finding:
    names = several([p.name for p, _ in small])
    return Finding(NAME, UNMEASURED, names, f"weight decay that {kind} weights keep", why, mend=MEND)


def _finding(lost: list[tuple[ParamInfo, float, float]], kind: str) -> Finding:
    p, planned, seen = lost[0]
    half = torch.finfo(p.parameter.dtype).eps / 4
    measured = f"shrunk by {seen + 0.0:.3g}: half a step of {kind} is at least {half:.3g} of a weight"
    if not math.isfinite(seen):
        measured = f"not finite where the gradient is 0: eps is 0 in {kind}"
    return Finding(
        NAME,
        FAIL,
        several([q.name for q, _, _ in lost]),
        f"shrunk by lr·wd = {planned:.3g} a step ({p.name})",
        measured,
        (f"weights kept in {kind} alone: a decay that is smaller than half their step is rounded away, every time",),
        MEND,
    )


def _planned_shrink(ctx: Context, p: ParamInfo) -> float:
    """lr·wd of a tensor where it surely vanishes in its dtype; else 0."""
    group = ctx.expected.get(id(p.parameter))
    if p.parameter.dtype not in LOW or group is None or not ROLES[p.role].trained:
        return 0.0
    shrink = float(group["lr"]) * float(group["weight_decay"])
    # w in [1, 2) has steps of eps, and stays w where less than eps/2 is taken off: less than a share of eps/4 for every w
    return shrink if shrink < torch.finfo(p.parameter.dtype).eps / 4 else 0.0


def _fresh(ctx: Context, held: list[tuple[ParamInfo, float]]) -> list[tuple[ParamInfo, float, float]]:
    """Tensors that one step with zero gradients does not shrink as their group says: (tensor, planned, measured)."""
    groups = {id(q): g for o in ctx.optimizers for g in o.param_groups for q in g["params"]}
    optimizers: list[Any] = list(ctx.optimizers)
    lost = []
    with undone(ctx, optimizers):
        before = {id(p.parameter): p.parameter.detach().float() for p, _ in held}
        for p in ctx.placed:
            p.parameter.grad = torch.zeros_like(p.parameter) if id(p.parameter) in groups else None
        for optimizer in optimizers:
            optimizer.step()
        for p, _ in held:
            group, w = groups[id(p.parameter)], before[id(p.parameter)]
            # by what the group says, for whether that is planned is another check's
            wanted = peak_rate(ctx, group) * float(group["weight_decay"])
            seen = _shrink(kept_weights(p.parameter, optimizers), w)
            # Stochastic rounding moves few elements by a whole step each: its mean is right, with this deviation.
            noise = 4 * math.sqrt(torch.finfo(p.parameter.dtype).eps * wanted / w.numel())
            kept = abs(seen - wanted) <= 0.2 * wanted + noise
            # that none of many elements moved is no noise
            if wanted and (not kept or (seen == 0 and w.numel() * wanted > 0.1)):
                lost.append((p, wanted, seen))
    return lost


def _begun(ctx: Context, held: list[tuple[ParamInfo, float]]) -> list[tuple[ParamInfo, float, float]]:
    """Tensors of which the state of a running optimizer has no master."""
    bare = [kept_weights(p.parameter, ctx.optimizers).data_ptr() == p.parameter.data_ptr() for p, _ in held]
    return [(p, shrink, 0.0) for (p, shrink), alone in zip(held, bare, strict=True) if alone]


def _shrink(after: Tensor, before: Tensor) -> float:
    square = float((before * before).sum())
    return -float(((after.float() - before) * before).sum()) / square if square else 0.0
