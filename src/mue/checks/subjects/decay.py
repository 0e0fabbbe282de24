"""Does every tensor shrink by lr·wd in a step, once, and only those that are planned to? A step without a gradient is the decay alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mue.checks.context import Context
from mue.checks.probe import Probe, probed
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, Finding, several

NAME = "weight decay"
NEAR = 0.05  # relative
MEND = "optimizer = torch.optim.AdamW(plan.param_groups(model)), or decay in one place alone: p *= 1 - lr·wd"


@check_of(NAME, place=15, needs=("roles", "plan", "values", "batch"))
@probed(NAME)
def decay(ctx: Context, found: list[Probe]) -> Iterator[Finding]:
    """Measured in the weights, whoever decays them. A decay that low precision rounds away is ``moved``'s."""
    judged = [one for one in found if not one.copied and not one.unsteady and one.weight > 0]
    wrong = [one for one in judged if _off(one)]
    yield from _faults(judged, wrong)
    if not judged:
        yield Finding(NAME, SKIP, measured=f"all {len(found)} tensors move without a gradient, or are 0")
    elif not wrong:
        rest = len(found) - len(judged)
        more = f"; {rest} move without a gradient, or are 0" if rest else ""
        yield Finding(NAME, PASS, measured=f"{len(judged)} tensors shrink by lr·wd of their groups{more}")


def _off(one: Probe) -> bool:
    # 1 - lr·wd is a number of single precision, and each product with it is rounded once
    rounding = 6e-8 * (1 + 8 / math.sqrt(one.info.parameter.numel()))
    return abs(one.shrunk - one.decay) > NEAR * one.decay + rounding


def _faults(judged: list[Probe], wrong: list[Probe]) -> Iterator[Finding]:
    exchanged = any(one.decay and not _seen(one) for one in wrong) and any(not one.decay for one in wrong)
    kinds: dict[str, list[Probe]] = {}
    for one in wrong:
        kinds.setdefault(_cause(one), []).append(one)
    for cause, many in kinds.items():
        one = many[0]
        causes = (cause, "the set that is decayed is another than the planned one") if exchanged else (cause,)
        yield Finding(
            NAME,
            FAIL,
            several([p.info.name for p in many]),
            f"shrunk by lr·wd = {one.decay:.4g} a step ({one.info.name})",
            f"shrunk by {one.shrunk + 0.0:.4g}, {len(many)} of {len(judged)} tensors alike",
            causes,
            MEND,
        )


def _seen(one: Probe) -> bool:
    """Whether a tensor is decayed at all."""
    return abs(one.shrunk) > 0.1 * one.decay


def _cause(one: Probe) -> str:
    """What was done, by the ratio of what a step takes off to lr·wd."""
    if not one.decay:
        return "a tensor is decayed whose group has no decay (a gain, a bias, an embedding)"
    ratio = one.shrunk / one.decay
    if abs(ratio) < 0.1:
        return "never applied: a fused or wrapped step leaves it out, or it joins the gradient"
    if abs(ratio - 2) < 0.1:
        return "applied twice: by the optimizer and by what wraps it, or beside it in the loop"
    if abs(ratio * one.lr - 1) < 0.1:
        return "not multiplied by the rate: the plan's is p *= 1 - lr·wd"
    return f"{ratio:.3g} × lr·wd: another rate or another decay in the step"
