"""The first two steps of AdamW with the planned values, which are known exactly, against those that an optimizer made."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mue.checks.context import Context
from mue.checks.optimizers import state_of
from mue.checks.training_step import AGAIN, TensorStep, starts_at_zero, training_steps

NEAR, FAR = 0.01, 0.2  # relative: AdamW up to rounding; another algorithm, and no approximation of its numbers


def first_step_fault(ctx: Context, s: TensorStep) -> tuple[str, str, str] | None:
    """(name, expected, measured) where the step is not AdamW's first one with the planned values."""
    planned = ctx.expected.get(id(s.info.parameter))
    if planned is None or s.gradient is None:
        return None
    wide = torch.promote_types(s.before.dtype, torch.float32)  # a hundredth is asked for
    g, w = s.gradient.to(wide), s.before.to(wide)
    # AdamW's first step: after bias correction m = g and √v = |g|, whatever the betas
    step = planned["lr"] * g / (g.abs() + planned["eps"])
    decay = planned["lr"] * planned["weight_decay"]
    wanted = -step - decay * w
    size, off = _rms(wanted), _rms(s.change.to(wide) - wanted)
    digits = torch.finfo(s.before.dtype).eps
    # a hundredth of the step, and what the stored weight rounds off it
    if off > 1e-2 * size + 2 * digits * _rms(w):
        return s.info.name, f"rms {size:.4g}", f"rms {_rms(s.change):.4g}, off by {off:.4g}"
    # The decay is a small part of the step, but the only part along the weights themselves.
    square = float((w * w).sum())
    shrunk = -float(((s.change.to(wide) + step) * w).sum()) / square if square else decay
    # 5 % of the decay, beside what rounding of the step and of the stored weight can leave along w
    if abs(shrunk - decay) > 0.05 * decay + 1e-3 * planned["lr"] + 4 * digits:
        return s.info.name, f"shrunk by lr·wd = {decay:.4g}", f"shrunk by {shrunk:.4g}"
    return None


def _rms(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) / math.sqrt(max(x.numel(), 1))


def distance(ctx: Context, optimizer: Any) -> float | None:
    """How far an optimizer's first two steps are from those of AdamW with the planned values, relative to these.

    The first step alone tells AdamW from few others: after bias correction it is a sign, as Lion's or Adamax's.

    Args:
        optimizer: one of those given, without a state.

    Returns:
        The largest distance of a tensor, at least :data:`NEAR` where only the decay is another; None where it cannot be seen:
        no batch, no weights, a plan for another optimizer, a state, a model that cannot be run.
    """
    if (
        ctx.batch is None
        or ctx.meta
        or ctx.plan.tuned.optimizer != "adamw"
        or state_of(optimizer)
        or starts_at_zero(ctx)
    ):
        return None
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    try:
        steps = [s for s in training_steps(ctx) if id(s.info.parameter) in held and s.gradient is not None]
    except Exception:  # a model that cannot be run is named by the checks that run it
        return None
    seen = [(_distances(ctx, s), first_step_fault(ctx, s)) for s in steps]
    return max((max(*both, 2 * NEAR if fault else 0.0) for both, fault in seen), default=None)


def _distances(ctx: Context, s: TensorStep) -> tuple[float, float]:
    """Of the first and of the second step, whose gradient is AGAIN times the first one's."""
    planned = ctx.expected.get(id(s.info.parameter))
    if planned is None or s.gradient is None or s.second is None:
        return 0.0, 0.0
    g, w, first = s.gradient.float(), s.before.float(), s.change.float()
    b1, b2 = planned["betas"]
    shrink = planned["lr"] * planned["weight_decay"]
    one = -planned["lr"] * g / (g.abs() + planned["eps"]) - shrink * w
    m = g * (b1 + AGAIN) / (1 + b1)  # ((1-β1)·β1 + (1-β1)·AGAIN)/(1-β1²)
    v = g * g * (b2 + AGAIN**2) / (1 + b2)
    two = -planned["lr"] * m / (v.sqrt() + planned["eps"]) - shrink * (w + first)
    rounding = 2 * torch.finfo(s.before.dtype).eps * _rms(w)
    return tuple(  # type: ignore[return-value]
        max(_rms(seen.float() - wanted) - rounding, 0.0) / max(_rms(wanted), 1e-30)
        for seen, wanted in ((first, one), (s.second, two))
    )
