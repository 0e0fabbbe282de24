"""``mue.check``: all checks of one model against its plan, in order of what they need."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mue.checks.calls import check_calls
from mue.checks.context import Context, Loss
from mue.checks.optimizers import unwrapped
from mue.checks.registry import CHECKS, Check
from mue.checks.report import FAIL, SKIP, CheckError, Finding, Report
from mue.plan.plan import PlanData
from mue.rules.roles import has_task
from mue.util.errors import explain_calls

_CALLED = (
    "; the check calls model(batch) itself, also where loss= is given: give a tuple (inputs, targets) to a model that takes both,"
    " or a mapping of keywords"
)


@explain_calls
def check(
    model: nn.Module,
    plan: PlanData,
    batch: Any = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scheduler: Any = None,
    *,
    checkpoint: Any = None,
    clip: Callable[[], Any] | None = None,
    loss: Loss | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    tokens: int = 64,
    raises: bool = True,
    allow_unmeasured: Sequence[str] = (),
) -> Report:
    """Prove the wiring of a freshly built model before money is spent. The model is left as it was.

    Without a batch, or on the meta device, only what needs no forward is checked (coverage, tied weights, init, groups,
    scheduler, gates, plan hash); with one, one forward and one training step as well.

    Args:
        model: as it will be trained, drawn by ``plan.init_``, on any device.
        plan: as it was applied: the folded one for stock forward code.
        batch: what the model is called with: a mapping (keywords), a tuple (arguments) or a tensor. 2 × 64 tokens do.
        optimizer: the one that will train, or several, or what wraps them. scheduler: on it, or a function of the step that
            sets the rates, or one for each optimizer.
        checkpoint: a path or mapping that has to carry the plan's hash.
        clip: the call that clips, e.g. ``lambda: clip_grad_norm_(model.parameters(), 1.0)``.
        loss: ``(model, batch) -> scalar``; by default what the model returns as ``loss``.
        only, skip: names of checks (:data:`mue.checks.CHECKS`); skip ``"init"`` for a model that was trained already.
        tokens: how many tokens the branches are taken apart on.
        raises: raise where something fails, or was planned and could not be measured; else return the report.
        allow_unmeasured: what may stay unmeasured: names of checks, or places as a finding names them (``*``: any part).

    Raises:
        CheckError: something is wired wrong, or could not be looked at; names the tensor or module, what was expected and
            measured, the likeliest causes and the line that mends it.
        ValueError: an unknown name in ``only`` or ``skip``; an argument that is not what it has to be.

    What each check measures stands in its own file, and in docs/checks.md.
    """
    for name in (*only, *skip):
        CHECKS.lookup(name)
    optimizers = () if optimizer is None else tuple(unwrapped(optimizer))
    check_calls(scheduler, clip, loss)
    ctx = Context(model, plan, batch, optimizers, scheduler, checkpoint, clip, loss, tokens)
    here = [c for c in CHECKS.values() if has_task(plan.target, c.task)]
    wanted = [c for c in (CHECKS.values() if only else here) if c.name not in skip and (not only or c.name in only)]
    findings: list[Finding] = []
    seconds: dict[str, float] = {}
    lacking = _lacking(ctx)
    for one in wanted:
        start = time.perf_counter()
        findings += _run(one, ctx, lacking)
        seconds[one.name] = time.perf_counter() - start
    allowed = (allow_unmeasured,) if isinstance(allow_unmeasured, str) else tuple(allow_unmeasured)
    report = Report(tuple(findings), plan.hash, seconds, allowed)
    if raises and not report.ok:
        raise CheckError(report)
    return report


def _lacking(ctx: Context) -> dict[str, str]:
    """What is not there → why, so that a check that needs it is left out with a reason."""
    lacking = {}
    try:
        _ = ctx.placed
        try:
            _ = ctx.tensor_plans
        except ValueError:
            lacking["plan"] = "the model is not the planned one: see coverage"
    except ValueError:
        lacking["roles"] = "some tensors have no role: see coverage"
    if ctx.meta:
        lacking["values"] = "the model has shapes only (meta device)"
    if ctx.batch is None:
        lacking["batch"] = "no batch was given"
    return lacking


def _run(one: Check, ctx: Context, lacking: dict[str, str]) -> list[Finding]:
    """One check's findings.

    A check that lacks something is left out with the reason, and one that fails is a finding itself.
    """
    run = one.run
    missing = [lacking[need] for need in one.needs if need in lacking]
    if missing and one.otherwise is not None and "roles" not in lacking:
        run, missing = one.otherwise, []
    if missing:
        return [Finding(one.name, SKIP, measured=missing[0])]
    try:
        return list(run(ctx))
    except Exception as error:  # the user's forward, loss, clip or scheduler failed: that is a finding, not a crash
        if "batch" in one.needs:
            # the checks after this one would fail in the same way, and say less
            lacking["batch"] = f"the model could not be run: see {one.name}"
        first = (str(error) or "no message").splitlines()[0]
        raised = traceback.extract_tb(error.__traceback__)[-1]  # the model's file, the batch's, or the check's own
        return [
            Finding(
                one.name,
                FAIL,
                f"{type(ctx.model).__name__}",
                "the check can run",
                f"{type(error).__name__}: {first} ({Path(raised.filename).name}:{raised.lineno})",
                ("the batch is not what the model takes", "the model cannot run as it is"),
                "call the model on this batch by hand first" + (_CALLED if "batch" in one.needs else ""),
            )
        ]
