"""Is every tensor planned, and is this the model that was planned? Needs shapes only, so it works on the meta device."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mue.checks.context import Context
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, WARN, Finding, several
from mue.layouts.layout import ParamInfo, canonical
from mue.layouts.place import MisfitError
from mue.rules.roles import ROLES

NAME = "coverage"
_OTHER = ("the model was built from another shape or plan (a stale plan)", "its layout table is out of date")


@check_of(NAME, place=1)
def coverage(ctx: Context) -> Iterator[Finding]:
    """Every trainable tensor has exactly one role, sizes and declared multipliers are the plan's, what trains can."""
    try:
        placed, plans = ctx.placed, ctx.tensor_plans
    except ValueError as error:
        yield from _faults(error)
        return
    frozen = [p.name for p in placed if ROLES[p.role].trained and not p.parameter.requires_grad]
    if frozen:
        yield Finding(
            NAME,
            FAIL,
            several(frozen),
            "every planned parameter is trained",
            f"{len(frozen)} of {len(placed)} have requires_grad = False",
            ("frozen by hand or by a loader", "made under torch.no_grad or as a buffer"),
            f"model.get_parameter({frozen[0]!r}).requires_grad_(True)",
        )
    trainable = [p for p in placed if not ROLES[p.role].trained and p.parameter.requires_grad]
    if trainable:
        yield _trainable(trainable)
    if ctx.plan.inputs.base is not None and _nothing_changes(ctx):
        yield Finding(
            NAME,
            WARN,
            "plan",
            "some factor differs from 1",
            "base and target are the same: every factor is 1",
            ("the target's numbers were given for the base too",),
            "give the shape that was tuned as the base",
        )
    total = sum(p.parameter.numel() for p in placed)
    roles = len({p.role for p in placed})
    if not frozen and not trainable:
        yield Finding(
            NAME, PASS, measured=f"{len(plans)} tensors, {total:,} parameters, {roles} roles{_left_alone(ctx)}"
        )


def _left_alone(ctx: Context) -> str:
    """What the model's table calls unplanned, for the same line: named, and whether it is trained by somebody else."""
    alone = ctx.placement.unplanned
    if not alone:
        return ""
    trained = sum(p.requires_grad for p in alone.values())
    return f"; left alone: {several(list(alone))} ({trained} of {len(alone)} trained, by groups that are no plan's)"


def _trainable(found: list[ParamInfo]) -> Finding:
    """A trained bias under a role that no optimizer moves would keep its first value, and nothing else would say so."""
    name, role = found[0].name, found[0].role
    return Finding(
        NAME,
        FAIL,
        several([p.name for p in found]),
        f"requires_grad = False: a {role} is moved by load statistics and is in no optimizer group",
        f"{len(found)} can be trained (requires_grad = True)",
        (f"a bias that the loss trains was declared {role}", "a balance bias made as an ordinary parameter"),
        f"one that is trained: Layout({found[0].layout.pattern!r}, 'bias', {found[0].layout.axes});"
        f" a balance bias: model.get_parameter({name!r}).requires_grad_(False)",
    )


def _nothing_changes(ctx: Context) -> bool:
    plan = ctx.plan
    if plan.folding is not None or any(a != 1 for a in (*plan.multipliers.output, *plan.multipliers.route)):
        return False
    return all(f in (None, 1.0) for r in plan.roles.values() if r.count for _, f in r.factor.items())


def _faults(error: ValueError) -> Iterator[Finding]:
    """One finding for each fault of a refusal, whose line names its tensor first."""
    head, *lines = str(error).split("\n")
    if isinstance(error, MisfitError):
        lines = list(error.faults)
    for line in lines or [head]:
        # the refusals' own wording (mue.layouts.place.place, mue.model.match): the tensor first, the way out last
        name = re.match(r"\s*(\w+(?:\.[\w*]+)+|\w+(?= \(\d))", line)
        multiplier = re.search(r"the model's (\w+) multiplier", line)
        where = canonical(name[1]) if name else f"{multiplier[1]} multiplier" if multiplier else head.rstrip(":")
        mend = re.search(r"(?:: |; )((?:add|remove|keep|set|use|build|give|correct) .*)$", line)
        yield Finding(
            NAME,
            FAIL,
            where,
            "one role for every tensor, and the planned sizes and multipliers",
            line.strip(),
            _OTHER,
            mend[1] if mend else "plan again for this model: plan = mue.transfer(base, target, tuned)",
        )
