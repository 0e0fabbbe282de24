"""Does Muon average gradients over the planned time, and look ahead by one step (Nesterov)?"""

from __future__ import annotations

from collections.abc import Iterator

from mue.checks.context import Context
from mue.checks.matrix_step import NOTHING, counted, remembered
from mue.checks.probe import Probe, probed
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, Finding, several

NAME = "momentum"


@check_of(NAME, place=13, needs=("roles", "plan", "values", "batch"))
@probed(NAME)
def momentum(ctx: Context, found: list[Probe]) -> Iterator[Finding]:
    """The second of two steps: against what ratio of both gradients do directions turn their sign?"""
    if ctx.plan.tuned.optimizer != "muon":
        yield Finding(NAME, SKIP, measured="no tensor is planned for Muon")
        return
    wrong: dict[tuple[str, str, str], list[str]] = {}
    seen = 0
    for one in found:
        if one.planned != "muon" or one.copied or one.core2 is None or not bool(one.core2.any()):
            continue
        seen += 1
        planned = float(one.group["momentum"])
        low, high = remembered(one)
        if low <= counted(planned, nesterov=True) <= high:
            continue
        if low > high:
            measured = "directions turn their sign at no ratio of the two gradients"
            wrong.setdefault((f"{planned:g}", measured, "another average than momentum's"), []).append(one.info.name)
            continue
        between = f"{max(low, 0):.3g} to {high:.3g}" if high < 10 else f"more than {low:.3g}"
        measured = f"the first gradient counts {between} of what the second does"
        wrong.setdefault((f"{planned:g}", measured, _cause(planned, low, high)), []).append(one.info.name)
    for (planned_text, measured, cause), names in wrong.items():
        ratio = counted(float(planned_text), nesterov=True)
        expected = f"momentum {planned_text} with Nesterov's look-ahead: {ratio:.3g} in the second step"
        yield Finding(
            NAME, FAIL, several(names), expected, measured, (cause,), f"momentum={planned_text}, nesterov=True"
        )
    if not seen:
        yield Finding(NAME, SKIP, measured=NOTHING)
    elif not wrong:
        yield Finding(NAME, PASS, measured=f"{ctx.plan.momentum:g} with Nesterov, in {seen} tensors")


def _cause(planned: float, low: float, high: float) -> str:
    if low <= counted(planned, nesterov=False) <= high:
        return "Nesterov's look-ahead is off"
    if low <= 0 <= high or high <= 0:
        return "the average is never kept: every step is of its own gradient"
    return "another momentum than the plan's (a default that was kept)"
