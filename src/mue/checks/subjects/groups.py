"""Does the optimizer hold what was planned? Its groups are read back, parameter by parameter. Works on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mue.checks.context import Context
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, Finding, several
from mue.rules.roles import ROLES
from mue.shapes.hparams import DECOUPLED

NAME = "groups"
READ = ("lr", "weight_decay", "eps", "betas", "momentum")
MEND = "optimizer = torch.optim.AdamW(plan.param_groups(model))"


@check_of(NAME, place=4, needs=("roles", "plan"))
def groups(ctx: Context) -> Iterator[Finding]:
    """lr, weight decay, eps and betas of every parameter, every parameter once, and the right kind of decay (C6)."""
    if not ctx.optimizers:
        yield Finding(NAME, SKIP, measured="no optimizer was given")
        return
    found = [*_membership(ctx), *_kinds(ctx), *_values(ctx)]
    yield from found
    if not found:
        count = sum(len(o.param_groups) for o in ctx.optimizers)
        yield Finding(NAME, PASS, measured=f"{count} groups as planned")


def _held(ctx: Context) -> list[tuple[Any, dict[str, Any]]]:
    return [(p, group) for o in ctx.optimizers for group in o.param_groups for p in group["params"]]


def _membership(ctx: Context) -> Iterator[Finding]:
    """Parameters in no group, in several, or of another model: by identity, for a copy has the same names."""
    held = [id(p) for p, _ in _held(ctx)]
    missing = [p.name for p in ctx.placed if ROLES[p.role].trained and id(p.parameter) not in set(held)]
    twice = [ctx.names[i].name for i in set(held) if i in ctx.names and held.count(i) > 1]
    strange = [tuple(p.shape) for p, _ in _held(ctx) if id(p) not in ctx.names]
    if missing:
        causes: tuple[str, ...] = (
            "left out when the groups were built (a filter by name, dimension or requires_grad)",
        )
        if strange:
            causes = (
                "the optimizer was built before the model was moved, copied or tied, and holds the old tensors",
                *causes,
            )
        yield Finding(
            NAME, FAIL, several(missing), "in the optimizer", f"{len(missing)} parameters are in no group", causes, MEND
        )
    if twice:
        yield Finding(
            NAME,
            FAIL,
            several(twice),
            "in one group",
            "in several groups, so stepped several times",
            ("a pattern of another group matches too",),
            MEND,
        )
    if strange and not missing:
        yield Finding(
            NAME,
            FAIL,
            f"optimizer: a tensor of shape {strange[0]}",
            "parameters of this model only",
            f"{len(strange)} tensors are not the model's",
            ("the optimizer belongs to another copy of the model",),
            MEND,
        )


def _kinds(ctx: Context) -> Iterator[Finding]:
    """Adam adds the decay to the gradient; the plan's decay is decoupled from it."""
    for o in ctx.optimizers:
        # type, not isinstance: torch.optim.AdamW is a subclass of Adam
        coupled = type(o) is torch.optim.Adam and not any(g.get("decoupled_weight_decay") for g in o.param_groups)
        if coupled and ctx.plan.tuned.optimizer in DECOUPLED and any(g["weight_decay"] for g in o.param_groups):
            yield Finding(
                NAME,
                FAIL,
                "optimizer torch.optim.Adam: weight_decay",
                "decoupled decay, p *= 1 - lr·wd",
                "L2: the decay joins the gradient and is normalised away",
                ("Adam was written for AdamW",),
                MEND,
            )


def _values(ctx: Context) -> Iterator[Finding]:
    """Each setting of each group against the planned one. Of lr the phase of a schedule that has begun is taken out."""
    rows = [
        (ctx.names[id(p)], group, ctx.expected[id(p)])
        for p, group in _held(ctx)
        if id(p) in ctx.expected and id(p) in ctx.names
    ]
    phase = _phase([(g, e) for _, g, e in rows])
    wrong: dict[tuple[str, str, str, str], list[str]] = {}
    for placed, group, expected in rows:
        for key in READ:
            if key not in group or key not in expected:
                continue
            planned, actual = expected[key], group[key]
            if key == "lr":
                planned, actual = expected["lr"] * phase, float(actual)
            if not _same(actual, planned):
                wrong.setdefault((key, placed.role, _text(planned), _text(actual)), []).append(placed.name)
    for (key, role, planned, actual), names in wrong.items():
        yield Finding(
            NAME, FAIL, f"{several(names)}: {key}", f"{key} {planned}", f"{key} {actual}", _causes(key, role), MEND
        )


def _phase(rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """What a scheduler has multiplied into every lr so far: allowed where ``initial_lr`` still is the planned one."""
    ratios = sorted(float(g["lr"]) / e["lr"] for g, e in rows if e["lr"])
    kept = [g for g, e in rows if "initial_lr" in g and _same(float(g["initial_lr"]), e["lr"])]
    # without the planned initial_lr in most groups it is no schedule, but another rate
    if not ratios or len(kept) * 2 < len(rows):
        return 1.0
    middle: float = ratios[len(ratios) // 2]
    return middle


def _same(a: Any, b: Any) -> bool:
    if isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    # a rate that went through float32 or through text is still the planned one
    return abs(float(a) - float(b)) <= 1e-6 * max(abs(float(a)), abs(float(b)))


def _text(value: Any) -> str:
    return ", ".join(f"{v:.6g}" for v in value) if isinstance(value, tuple | list) else f"{float(value):.6g}"


def _causes(key: str, role: str) -> tuple[str, ...]:
    if key == "lr":
        return (
            f"{role} is in the group of another role (often the base lr)",
            "the groups are another plan's (a stale plan)",
            "lr was overwritten after the groups were built",
        )
    if key == "weight_decay":
        return (
            "the decay list was built by number of dimensions or by name, not by role",
            "one decay for all groups",
            "a stale plan",
        )
    if key == "eps":
        return ("eps given as one default instead of by group", "torch's default 1e-8 was kept")
    return ("given as the optimizer's default instead of by group", "not rescaled for batch and duration")
