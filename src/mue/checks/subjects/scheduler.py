"""Does the scheduler keep the ratios between groups, and does it reach their planned peaks? It is stepped through its whole run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mue.checks.context import Context
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, UNMEASURED, WARN, Finding, several
from mue.checks.schedule import LONGEST, Offence, Walk, feeds_on_loss, planned_peak, stated_peak, walk
from mue.layouts.layout import canonical
from mue.shapes.hparams import warmup_steps

NAME = "scheduler"
MEND = "torch.optim.lr_scheduler.LambdaLR(optimizer, factor)  # factor(step) has its peak at 1"
SHORTFALL = 0.95  # a peak that lies between two steps (OneCycleLR of few steps) is missed by less than that
LENGTHS = 0.1  # by how much a schedule's length may differ from the plan's steps


@check_of(NAME, place=5, needs=("roles", "plan"))
def scheduler(ctx: Context) -> Iterator[Finding]:
    """After every step all rates are one multiple of their planned peaks, at most 1, and nothing else changed."""
    seen = walk(ctx)
    if seen is None:
        text = "no scheduler was given" if ctx.scheduler is None else "no optimizer was given"
        yield Finding(NAME, SKIP, measured=text)
        return
    broken = _cannot_run(ctx, seen) or (_offended(ctx, seen.offence) if seen.offence is not None else None)
    if broken is not None:
        yield broken
        return
    found = _peak(ctx, seen)
    if found is not None:
        yield found
    if found is None or found.status == WARN:
        yield Finding(NAME, PASS, measured=f"ratios kept over {len(seen.factors)} steps{_short_warmup(ctx, seen)}")
    if ctx.plan.training is not None and not seen.begun and not feeds_on_loss(ctx.scheduler):
        yield from _length(ctx, seen, ctx.plan.training.steps)
        yield from _warmup(ctx, seen, ctx.plan.training.steps)


def _name(ctx: Context) -> str:
    given = ctx.scheduler[0] if isinstance(ctx.scheduler, list | tuple) else ctx.scheduler
    return type(given).__name__


def _cannot_run(ctx: Context, seen: Walk) -> Finding | None:
    if seen.idle:
        return Finding(
            NAME,
            FAIL,
            "the given function of the step",
            "it sets the rates of the optimizer's groups",
            "it returns a value, and no rate changes",
            ("it returns the factor or the rate, and something else writes it",),
            "def schedule(step): [g.update(lr=peak * factor(step)) for g, peak in zip(optimizer.param_groups, peaks)]",
        )
    if seen.elsewhere:
        return Finding(
            NAME,
            FAIL,
            _name(ctx),
            "it moves the rates of the optimizer that trains",
            "it was built on another optimizer: these rates never change",
            ("the optimizer was built again after the scheduler", "the scheduler of another model (a teacher, a copy)"),
            "build the scheduler on the optimizer that is given here",
        )
    if seen.error is None or seen.ended:
        return None
    return Finding(
        NAME,
        FAIL,
        f"{_name(ctx)} at step {len(seen.factors)}",
        "a scheduler with step(), or a function of the step that sets the rates",
        f"{type(seen.error).__name__}: {(str(seen.error) or 'no message').splitlines()[0]}",
        ("another object than the scheduler was given", "the scheduler belongs to another optimizer"),
        MEND,
    )


def _offended(ctx: Context, offence: Offence) -> Finding:
    where = f"{_name(ctx)} at step {offence.step}: {_names(ctx, offence.groups)}"
    if offence.key != "lr":
        return Finding(
            NAME,
            FAIL,
            where,
            f"{offence.key} {offence.before}, as planned",
            f"{offence.key} {offence.after}",
            ("the scheduler cycles momentum too (OneCycleLR's default)", "a schedule of weight decay"),
            "switch it off (cycle_momentum=False)",
        )
    groups = [g for o in ctx.optimizers for g in o.param_groups if g["params"]]
    factors = offence.after
    rates = {f * planned_peak(ctx, g) for f, g in zip(factors, groups, strict=True)}
    same = max(rates) - min(rates) <= 1e-9 * max(rates)
    spread = f"factors on the planned peaks from {min(factors):.6g} to {max(factors):.6g}"
    return Finding(
        NAME,
        FAIL,
        where,
        "every lr at the same multiple of its planned peak",
        f"{spread}; all rates are {max(rates):.4g}" if same else spread,
        (
            "the scheduler writes one absolute lr (OneCycleLR's max_lr, a hand-written loop) instead of a factor"
            if same
            else "a floor or peak given as one absolute lr (eta_min, end_lr, base_lr) instead of one for each group",
            "lambdas that differ by group",
            "the groups' lr are not the planned ones: see groups",
        ),
        MEND + ", or a list of peaks: max_lr=[g['lr'] for g in optimizer.param_groups]",
    )


def _names(ctx: Context, groups: list[dict[str, Any]]) -> str:
    held = [p for g in groups for p in g["params"]]
    return several([canonical(ctx.names[id(p)].name) for p in held if id(p) in ctx.names] or ["a group"])


# ---- its height ------------------------------------------------------------------------------------------------------------


def _peak(ctx: Context, seen: Walk) -> Finding | None:
    """Whether the highest rates are the planned ones; a fault, or None.

    A group that states its peak may miss it between two steps, or have it behind it or beyond what was walked.
    """
    highest = max(seen.factors)
    groups = [g for o in ctx.optimizers for g in o.param_groups if g["params"]]
    stated = all(abs(stated_peak(g) / planned_peak(ctx, g) - 1) <= 1e-5 for g in groups)
    rising = len(seen.factors) >= LONGEST and seen.factors[-1] >= highest * (1 - 1e-6)
    if highest <= 1 + 1e-3 and (highest >= (SHORTFALL if stated else 1 - 1e-3) or (stated and (seen.begun or rising))):
        return None
    if highest < 1 and (seen.begun or rising):
        why = "it has begun already" if seen.begun else f"it still rises at step {LONGEST:,}"
        return Finding(
            NAME,
            UNMEASURED,
            f"{_name(ctx)}: highest rates",
            "the planned peaks",
            why,
            mend="check it before its first step",
        )
    return Finding(
        NAME,
        # a factor that stays below 1 on the planned rates is a form of schedule (warmup times decay): it is said, and no fault
        WARN if stated and highest < 1 else FAIL,
        f"{_name(ctx)}: highest rates",
        "the planned peaks",
        f"{highest:.4g} × the planned peaks",
        ("the factor's highest value is not 1",)
        if stated
        else (
            "lr was changed by hand after the groups were built",
            "max_lr is not the planned peak",
            "a stale plan",
        ),
        MEND,
    )


# ---- its length ------------------------------------------------------------------------------------------------------------


def _length(ctx: Context, seen: Walk, steps: int) -> Iterator[Finding]:
    """A warning where the schedule is for a run of another length than the plan's."""
    f = seen.factors[:steps]
    highest = max(f)
    text = ""
    at_end = seen.factors[min(seen.length, len(seen.factors)) - 1] if seen.length else highest
    # a length that ends at the peak is that of a warmup (LinearLR), not of the run
    if seen.length and at_end < 0.9 * highest and abs(seen.length / steps - 1) > LENGTHS:
        text = f"it is of {seen.length:,} steps"
    elif len(f) < steps and seen.ended:
        text = f"it cannot be stepped past {len(f):,}"
    elif len(f) == steps and f[-1] < 0.99 * highest:
        tail = next((i for i in range(steps - 1, -1, -1) if abs(f[i] - f[-1]) > 1e-6 * highest), -1) + 1
        # nothing is learned at a rate of 0; a low constant may be meant (steps), unless it is most of the run
        if tail < (steps * (1 - LENGTHS) if f[-1] <= 1e-6 * highest else steps / 2):
            text = f"it is over at step {tail:,}: from there on {f[-1]:.3g} × the peak"
    if text:
        yield Finding(
            NAME,
            WARN,
            f"{_name(ctx)}: length",
            f"a schedule over the plan's {steps:,} steps",
            text,
            ("built for another run", "stepped once an epoch, or several times a step", "another plan"),
            f"build it with {steps} steps (plan.training.steps), or plan for the steps that are run",
        )


def _reached(seen: Walk, steps: int) -> int:
    """The step at which the peak of the first ``steps`` is reached, counted from 1."""
    return next(i for i, f in enumerate(seen.factors) if f >= 0.99 * max(seen.factors[:steps])) + 1


def _average(ctx: Context) -> float:
    """How many steps Adam's average over squared gradients lasts; 0 where no group has one."""
    betas = [g["betas"][1] for o in ctx.optimizers for g in o.param_groups if "betas" in g and g["params"]]
    return 1 / (1 - max(betas)) if betas else 0.0


def _short_warmup(ctx: Context, seen: Walk) -> str:
    """A note where rates rise to their peak in fewer steps than Adam's average over squared gradients lasts; else nothing."""
    average, reached = _average(ctx), _reached(seen, len(seen.factors))
    if seen.begun or feeds_on_loss(ctx.scheduler):
        return ""
    if reached >= average * (1 - 1e-9):
        return ""
    return f"; warmup of {reached} steps, shorter than 1/(1-β2) = {average:.4g}"


def _warmup(ctx: Context, seen: Walk, steps: int) -> Iterator[Finding]:
    """A warning where the peak is reached in less than half of the planned warmup, or before Adam's average that it spans."""
    given = ctx.plan.tuned.warmup
    planned = warmup_steps(given, steps)
    reached = _reached(seen, steps)
    if planned >= 2 and reached < planned / 2:
        yield Finding(
            NAME,
            WARN,
            f"{_name(ctx)}: warmup",
            f"{planned:.0f} steps of warmup ({given:g}{' of the run' if given < 1 else ' steps'}, as the base's)",
            "none" if reached == 1 else f"the peak is reached at step {reached}",
            ("the schedule has no warmup", "warmup given in other units than steps"),
            f"warm up over {planned:.0f} steps, or say how the base was tuned: mue.HParams(warmup=0.0)",
        )
    elif planned >= (average := _average(ctx)) > reached * (1 + 1e-9):
        yield Finding(
            NAME,
            WARN,
            f"{_name(ctx)}: warmup",
            f"{planned:.0f} steps of warmup, no less than Adam's average over squared gradients lasts",
            f"the peak is reached at step {reached}, within 1/(1-β2) = {average:.4g} steps",
            ("the highest rate meets a denominator of few gradients",),
            f"warm up over {planned:.0f} steps",
        )
