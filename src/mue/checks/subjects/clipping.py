"""Does gradient clipping see the gradients the base's threshold was tuned on? A fold changes their size, each by its own c."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mue.checks.context import Context
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, WARN, Finding, several
from mue.model.coefficients import coefficients

NAME = "clipping"
MEND = "mue.fold.clip_grad_norm_(model.parameters(), plan.tuned.clip, coefficients=mue.fold.coefficients(plan, model))"
FORCE = 10.0  # gradients are blown up to this many thresholds, so that the clip must act


@check_of(NAME, place=11, needs=("roles", "plan", "values"))
def clipping(ctx: Context) -> Iterator[Finding]:
    """One factor for all gradients, from the norm before the fold (docs/why/fold.md). ``clip`` is the user's call."""
    threshold = ctx.plan.tuned.clip
    if threshold is None:
        yield Finding(NAME, SKIP, measured="the plan does not clip")
        return
    if ctx.clip is None:
        yield _without_call(ctx, threshold)
        return
    if ctx.batch is None:
        yield Finding(NAME, SKIP, measured="no batch was given")
        return
    yield _measured(ctx, threshold, coefficients(ctx.plan, ctx.model))


def _without_call(ctx: Context, threshold: float) -> Finding:
    if ctx.plan.folding is None or not any(ctx.plan.folding.coefficients):
        return Finding(NAME, SKIP, measured="give clip=, the call that clips, to have it measured")
    return Finding(
        NAME,
        WARN,
        "the call that clips",
        "the norm of the unfolded gradients",
        f"the plan is folded and clips at {threshold:g}: torch's clip_grad_norm_ would weigh them wrongly",
        ("a folded gradient is 1/c of the other",),
        MEND,
    )


def _measured(ctx: Context, threshold: float, c: Mapping[Tensor, float]) -> Finding:
    """Let the user's call clip gradients of a known norm, and see by what each was multiplied.

    The norm is that before the fold, so a call that weighs the folded gradients as they are shows another factor than
    1/FORCE.
    """
    parameters = [p.parameter for p in ctx.placed]
    saved = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        ctx.loss_of_batch().backward()  # type: ignore[no-untyped-call]
        held = [p for p in parameters if p.grad is not None]
        _weigh_up(held, c)
        norm = _norm(held, c)
        for p in held:
            assert p.grad is not None
            # a clip that does not bind would multiply by 1, as none at all does
            p.grad.mul_(FORCE * threshold / norm)
        before = [p.grad.detach().clone() for p in held if p.grad is not None]
        assert ctx.clip is not None
        try:
            ctx.clip()
        except Exception as error:  # the user's own call: what is wrong is in it, not in the model
            return _raised(error)
        factors = [_factor(p.grad, b) for p, b in zip(held, before, strict=True)]
    finally:
        for p, grad in zip(parameters, saved, strict=True):
            p.grad = grad
    return _judged(ctx, held, [f for f in factors if f is not None])


def _weigh_up(held: list[Tensor], c: Mapping[Tensor, float]) -> None:
    """Make the gradients of folded tensors most of the norm: in this batch others (the embedding's) may hide them."""
    folded = [p for p in held if c.get(p, 1.0) != 1]
    rest = [p for p in held if c.get(p, 1.0) == 1]
    mine, others = _norm(folded, c), _norm(rest, c)
    if folded and rest and 0 < mine < 3 * others:
        for p in folded:
            assert p.grad is not None
            p.grad.mul_(3 * others / mine)


def _raised(error: Exception) -> Finding:
    line = traceback.extract_tb(error.__traceback__)[-1]
    return Finding(
        NAME,
        FAIL,
        "the call that clips",
        "clip= clips the gradients of the model when it is called",
        f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]} ({Path(line.filename).name}:{line.lineno})",
        ("its arguments are not those of the function that it calls",),
        "clip=lambda: " + MEND,
    )


def _judged(ctx: Context, held: list[Tensor], factors: list[float]) -> Finding:
    """All factors are one, and that one is 1/FORCE."""
    low, high, wanted = min(factors), max(factors), 1 / FORCE
    # one division and one product in float32: the factors of one clip agree to 1e-6
    if high - low > max(1e-3, ctx.tolerance) * high:
        worst = ctx.names[id(held[factors.index(low)])].name
        return Finding(
            NAME,
            FAIL,
            several([worst]),
            "one factor for all gradients",
            f"factors from {low:.4g} to {high:.4g}",
            ("clipped per tensor or per group instead of globally", "clipped by value"),
            MEND,
        )
    # torch adds 1e-6 to the norm before it divides; 1 % is far above that, and far below what a fold changes
    if abs(high - wanted) > max(1e-2, ctx.tolerance) * wanted:
        folded = ctx.plan.folding is not None
        return Finding(
            NAME,
            FAIL,
            "the call that clips",
            f"factor {wanted:g} at {FORCE:g} × the threshold",
            f"{high:.4g}",
            (
                "the norm is that of the folded gradients" if folded else "another threshold than the plan's",
                "clipped before the gradients are unscaled or summed",
            ),
            MEND,
        )
    return Finding(NAME, PASS, measured="one factor, from the unfolded norm")


def _norm(held: list[Tensor], c: Mapping[Tensor, float]) -> float:
    squares = [float(torch.linalg.vector_norm(p.grad)) ** 2 * c.get(p, 1.0) ** 2 for p in held if p.grad is not None]
    return math.sqrt(sum(squares))


def _factor(after: Tensor | None, before: Tensor) -> float | None:
    if after is None:
        return 0.0
    square = float((before.double() ** 2).sum())
    return float((after.double() * before.double()).sum()) / square if square else None
