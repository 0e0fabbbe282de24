"""The same transfer to other targets: how each role's factor moves with width, depth, experts, batch and duration.

A plan answers for one target. Beside it stand those that differ in one number by powers of two, planned by the same rule from the
same base, so that a reader sees which factors an axis moves and how steeply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mue.plan.base import base_of
from mue.plan.fold import fold
from mue.plan.plan import Inputs, PlanData
from mue.plan.transfer import plan_of
from mue.rules.roles import ROLES
from mue.shapes import MEASURED, Block, Training, Transformer

OCTAVES = range(-4, 5)  # from a sixteenth of the target to sixteen times
FORWARD = "multiplier"
SHOWN = ("lr", "init_std", "weight_decay")  # eps is in the plan's table; no run is decided by it


@dataclass(frozen=True)
class Curve:
    """One number of some roles over an axis.

    Attributes:
        of: one of :data:`SHOWN`, or :data:`FORWARD`. roles: those that share the curve, or the multipliers that do.
        factors: on the base's values, one for each ``x`` of the axis; a forward multiplier is the number itself.
    """

    of: str
    roles: tuple[str, ...]
    factors: tuple[float, ...]

    @property
    def moves(self) -> bool:
        return max(self.factors) > min(self.factors) * (1 + 1e-9)


@dataclass(frozen=True)
class Along:
    """One axis through a plan's target.

    Attributes:
        name, means: of the axis. x: numbers on it. here: the target's; base: the base's, None where it has none.
        curves: what the rule says at each ``x``. refused: why it has no answer for further ones; empty where it has.
    """

    name: str
    means: str
    x: tuple[float, ...]
    here: float
    base: float | None
    curves: tuple[Curve, ...]
    refused: str = ""


@dataclass(frozen=True)
class _Axis:
    """Where a target or a run is on an axis (None: nowhere), and another one there; ``ValueError`` where there is none."""

    means: str
    at: Callable[[Transformer, Training | None], float | None]
    move: Callable[[Inputs, float], Inputs]


def along(plan: PlanData) -> list[Along]:
    """Every axis that the plan's target is on.

    Args:
        plan: of any rule, folded or not; its neighbours are folded alike.

    Returns:
        The axes in the order of :data:`AXES`, each with at least the target itself on it.
    """
    found = []
    base = base_of(plan.inputs)
    for name, axis in AXES.items():
        here = axis.at(plan.target, plan.training)
        if here is None:
            continue
        plans, refused = _neighbours(plan, axis, here)
        found.append(
            Along(
                name=name,
                means=axis.means,
                x=tuple(plans),
                here=here,
                base=axis.at(base.shape, base.training),
                curves=tuple(_curves(plan, list(plans.values()))),
                refused=refused,
            )
        )
    return found


def _neighbours(plan: PlanData, axis: _Axis, here: float) -> tuple[dict[float, PlanData], str]:
    """Plans by their place on the axis, and the first refusal of the rule."""
    plans, refused = {}, ""
    start = replace(
        plan.inputs, training=plan.training
    )  # behind a base that is a plan, its run where the target has no own
    for octave in OCTAVES:
        if octave == 0:
            plans[here] = plan
            continue
        try:
            inputs = axis.move(start, 2.0**octave)
        except ValueError:  # no such model: half a head, more active experts than there are
            continue
        try:
            made = plan_of(inputs)
            plans[here * 2.0**octave] = made if plan.folding is None else fold(made, plan.folding.route)
        except ValueError as error:
            refused = refused or str(error)
    return plans, refused


def _curves(plan: PlanData, plans: list[PlanData]) -> Iterator[Curve]:
    """What is the same in every plan is one curve, whoever has it."""
    numbers = [dict(_numbers(plan, other)) for other in plans]
    shared: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for of, role in numbers[0]:
        values = [n.get((of, role)) for n in numbers]
        if all(v is not None and v > 0 for v in values):  # what is zero somewhere has no place on a logarithmic axis
            shared.setdefault((of, tuple(float(f"{v:.12g}") for v in values if v is not None)), []).append(role)
    yield from (Curve(of, tuple(roles), values) for (of, values), roles in shared.items())


def _numbers(plan: PlanData, other: PlanData) -> Iterator[tuple[tuple[str, str], float | None]]:
    """(number, role) → factor of one plan, by the roles and blocks of the first."""
    first, start = plan.blocks[0], 0
    for index, block in enumerate(plan.blocks):
        # at the same relative depth: with values for thirds of the layers, another depth may have other blocks
        middle = (start + block.layers / 2) / plan.target.layers
        there = other.blocks[other.block_of(int(middle * other.target.layers))]
        start += block.layers
        where = f" [{plan.layers_of(index)}]" if len(plan.blocks) > 1 else ""
        for role, own in block.roles.items():
            alike = index > 0 and first.roles[role].count and first.roles[role].values == own.values
            if not own.count or not ROLES[role].trained or alike:
                continue
            differs = any(b.roles[role].values != own.values for b in plan.blocks if b.roles[role].count)
            for of in SHOWN:
                yield (of, role + (where if differs else "")), getattr(there.roles[role].factor, of)
        yield (FORWARD, "A" + where), there.output_multiplier
        if block.roles["expert_up"].count:
            yield (FORWARD, "R" + where), there.route_scale
    yield (FORWARD, "residual"), other.residual_multiplier
    yield (FORWARD, "head"), other.head_multiplier


# ---- the axes --------------------------------------------------------------------------------------------------------


def _times(number: Any, factor: float) -> Any:
    """A count times a power of two, None as None; ``ValueError`` where it would not be whole."""
    if number is None:
        return None
    if not (number * factor).is_integer():
        raise ValueError(f"{number} × {factor} is no whole number")
    return int(number * factor)


def _blocks(inputs: Inputs, change: Callable[[Block], Mapping[str, Any]], **own: Any) -> Inputs:
    target = inputs.target
    changed = target.with_blocks([replace(block, **change(block)) for block in target.blocks])
    return replace(inputs, target=replace(changed, **own))


def _wider(inputs: Inputs, factor: float) -> Inputs:
    """As many heads more of the same size, and feed-forwards and experts in proportion."""
    own = {name: _times(getattr(inputs.target, name), factor) for name in ("width", "heads", "kv_heads")}
    return _blocks(inputs, lambda b: {n: _times(getattr(b, n), factor) for n in ("ffn", "expert", "shared")}, **own)


def _deeper(inputs: Inputs, factor: float) -> Inputs:
    return _blocks(inputs, lambda b: {"layers": _times(b.layers, factor)})


def _experts(names: tuple[str, ...]) -> Callable[[Inputs, float], Inputs]:
    def move(inputs: Inputs, factor: float) -> Inputs:
        return _blocks(inputs, lambda b: {n: _times(getattr(b, n), factor) for n in names} if b.experts else {})

    return move


def _of_experts(name: str) -> Callable[[Transformer, Training | None], float | None]:
    def at(shape: Transformer, _: Training | None) -> float | None:
        routed = [block for block in shape.blocks if block.experts]
        # measured moments are those of one router, of so many experts
        return getattr(routed[0], name) if routed and all(b.gates != MEASURED for b in routed) else None

    return at


def _run(name: str) -> _Axis:
    def move(inputs: Inputs, factor: float) -> Inputs:
        assert inputs.training is not None, "an axis that the plan is on"
        return replace(
            inputs, training=replace(inputs.training, **{name: _times(getattr(inputs.training, name), factor)})
        )

    means = {"batch": "Tokens of a step, with as many steps.", "steps": "Steps, at the same batch."}[name]
    return _Axis(means, lambda _, run: None if run is None else getattr(run, name), move)


AXES = {
    "width": _Axis("Width, with feed-forward and experts in proportion.", lambda s, _: s.width, _wider),
    "depth": _Axis("Depth, in blocks.", lambda s, _: s.layers, _deeper),
    "active experts": _Axis("Active experts of each token, of as many.", _of_experts("active"), _experts(("active",))),
    "experts": _Axis("Experts, with as many of them active.", _of_experts("experts"), _experts(("experts",))),
    "batch": _run("batch"),
    "duration": _run("steps"),
}
