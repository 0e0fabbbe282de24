"""Does the scheduler keep the ratios between groups? It is stepped through its whole run, and put back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from mue.checks.context import Context
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, Finding, several
from mue.layouts.layout import canonical

NAME = "scheduler"
STEPS = 2000  # where neither scheduler nor plan says how long it is; never more than five times that are walked
_LENGTH = ("T_max", "total_steps", "total_iters")  # as torch's schedulers (cosine, OneCycle, linear) call their length


@check_of(NAME, place=5, needs=("roles", "plan"))
def scheduler(ctx: Context) -> Iterator[Finding]:
    """After every step all rates are one and the same multiple of their planned peaks, and nothing else changed (C6)."""
    if ctx.scheduler is None or not ctx.optimizers:
        yield Finding(NAME, SKIP, measured="no scheduler was given")
        return
    groups = [g for o in ctx.optimizers for g in o.param_groups if g["params"]]
    saved = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in groups]
    state = copy.deepcopy(ctx.scheduler.state_dict()) if hasattr(ctx.scheduler, "state_dict") else None
    steps = min(_steps(ctx), STEPS * 5)
    try:
        found = _walk(ctx, groups, steps)
    finally:
        for group, before in zip(groups, saved, strict=True):
            group.update(before)
        if state is not None:
            ctx.scheduler.load_state_dict(state)
    yield found or Finding(NAME, PASS, measured=f"ratios kept over {steps} steps")


def _steps(ctx: Context) -> int:
    own = [getattr(ctx.scheduler, name, None) for name in _LENGTH]
    planned = ctx.plan.training.steps if ctx.plan.training else STEPS
    return max([n for n in own if isinstance(n, int)] or [min(planned, STEPS)])


def _stepper(given: Any) -> Callable[[int], Any]:
    if not hasattr(given, "step"):
        return given  # type: ignore[no-any-return]  # a function of the step, as hand-written loops have
    if type(given).__name__ == "ReduceLROnPlateau":
        return lambda step: given.step(1.0)  # a metric that never improves: it reduces as often as it can
    return lambda step: given.step()


def _walk(ctx: Context, groups: list[dict[str, Any]], steps: int) -> Finding | None:
    """The first step at which something is wrong, or None.

    Peaks are the planned rates, not those that the groups have.
    """
    peaks = [ctx.expected[id(g["params"][0])]["lr"] if id(g["params"][0]) in ctx.expected else g["lr"] for g in groups]
    fixed = [{k: g.get(k) for k in ("betas", "weight_decay", "eps", "momentum")} for g in groups]
    step_once = _stepper(ctx.scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(steps + 1):
            found = _ratios(ctx, groups, peaks, step) or _fixed(ctx, groups, fixed, step)
            if found is not None:
                return found
            if step < steps:
                step_once(step)
    return None


def _ratios(ctx: Context, groups: list[dict[str, Any]], peaks: list[float], step: int) -> Finding | None:
    factors = [float(g["lr"]) / peak for g, peak in zip(groups, peaks, strict=True) if peak]
    middle = sorted(factors)[len(factors) // 2]
    # against the middle one, so that a single wrong group is named and not all the others
    off = [g for g, f in zip(groups, factors, strict=False) if abs(f - middle) > 1e-5 * max(abs(f), abs(middle))]
    if not off:
        return None
    spread = f"factors on the planned peaks from {min(factors):.4g} to {max(factors):.4g}"
    same = len({float(g["lr"]) for g in groups}) == 1
    return Finding(
        NAME,
        FAIL,
        f"{type(ctx.scheduler).__name__} at step {step}: {_names(ctx, off)}",
        "every lr at the same multiple of its planned peak",
        f"{spread}; all rates are {float(groups[0]['lr']):.4g}" if same else spread,
        (
            "the scheduler writes an absolute lr (OneCycleLR's max_lr, a hand-written loop) instead of a factor"
            if same
            else "a floor or peak given as an absolute lr (eta_min, end_lr) instead of a factor",
            "lambdas that differ by group",
            "the groups' lr are not the planned ones: see groups",
        ),
        'for g in optimizer.param_groups: g["lr"] = g["initial_lr"] * factor(step)  # or LambdaLR',
    )


def _fixed(ctx: Context, groups: list[dict[str, Any]], fixed: list[dict[str, Any]], step: int) -> Finding | None:
    for group, before in zip(groups, fixed, strict=True):
        changed = [k for k, v in before.items() if group.get(k) != v]
        if changed:
            return Finding(
                NAME,
                FAIL,
                f"{type(ctx.scheduler).__name__} at step {step}: {_names(ctx, [group])}",
                f"{changed[0]} {before[changed[0]]}, as planned",
                f"{changed[0]} {group.get(changed[0])}",
                ("the scheduler cycles momentum too (OneCycleLR's default)", "a schedule of weight decay"),
                "switch it off (cycle_momentum=False)",
            )
    return None


def _names(ctx: Context, groups: list[dict[str, Any]]) -> str:
    held = [p for g in groups for p in g["params"]]
    return several([canonical(ctx.names[id(p)].name) for p in held if id(p) in ctx.names] or ["a group"])
