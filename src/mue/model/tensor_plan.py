"""What a plan says about each single tensor: the role's values, corrected for its own fan-in, its fold and its start."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from mue.layouts.layout import ParamInfo
from mue.model.coefficients import TensorFold, tensor_folds
from mue.model.matrices import matrices_of
from mue.plan.fold import folded_values
from mue.plan.fold_table import fold_of
from mue.plan.plan import PlanData
from mue.plan.update_scale import matrix_shape
from mue.plan.values import Values
from mue.rules.optimizers import of_tuned
from mue.rules.roles import ROLES
from mue.rules.table import FIELDS
from mue.shapes.update_scales import lr_ratio


class TensorPlan(NamedTuple):
    """One tensor's values.

    Attributes:
        info: the parameter with its role. values: absolute, as :meth:`PlanData.to_dict` has them.
        constant: what a gain or a bias starts at; None for a matrix, and where the model's code keeps its own start.
        scale: its size at the start against the base's, which the floor of a relative optimizer follows.
    """

    info: ParamInfo
    values: Values
    constant: float | None
    scale: float


def tensor_plans(plan: PlanData, model: nn.Module) -> list[TensorPlan]:
    """Every parameter of the planned model with its values, in the model's order.

    Args:
        plan: folded or not, as the model's forward pass is. model: the planned one; the meta device will do.

    Raises:
        ValueError: a model that is not the planned one; a fused tensor whose parts are planned differently.
    """
    return tensor_plans_of(plan, tensor_folds(plan, model))


def tensor_plans_of(plan: PlanData, folds: Iterable[TensorFold]) -> list[TensorPlan]:
    """:func:`tensor_plans` of parameters whose coefficients are known.

    Args:
        plan: folded or not. folds: one for each parameter, in the order of the result.
    """
    return [_tensor_plan(plan, fold.info, fold.own) for fold in folds]


def _tensor_plan(plan: PlanData, p: ParamInfo, own: float) -> TensorPlan:
    """``own`` is what is folded into this tensor beyond what its role's values have in them already."""
    planned = plan.role(p.role, p.layer)
    values = _for_own_fan_in(plan, p, _of_all_parts(plan, p))
    if own != 1:
        values = folded_values(plan, p.role, values, own)
    if ROLES[p.role].drawn and p.layout.start == 0:
        if fold_of(plan.tuned.optimizer).lr == 0:
            raise ValueError(
                f"{p.name} starts at 0, and {plan.tuned.optimizer} moves a weight in proportion to its size, so it would stay there:"
                " leave its start out"
            )
        values = replace(values, init_std=0.0)
    if ROLES[p.role].drawn:
        # Adafactor's floor eps2 is on rms(W), so it goes with the size the weight starts at (mue.plan.fold_table,
        # floor)
        return TensorPlan(p, values, None, own * (planned.factor.init_std or 1.0))
    return TensorPlan(p, values, _constant(p, planned.constant, own), own * (planned.constant or 1.0))


def _of_all_parts(plan: PlanData, p: ParamInfo) -> Values:
    """The role's values; those of every part of a fused tensor must be the same, for it is drawn and moved as one.

    Equal but for rounding is the same: a rate in another convention comes to each part by factors of its own shape.
    """
    values = plan.role(p.role, p.layer).values
    for part in p.layout.parts:
        other = plan.role(part, p.layer).values
        name = next((n for n in FIELDS if not _same(getattr(other, n), getattr(values, n))), None)
        if name is not None:
            raise ValueError(
                f"{p.name} holds {', '.join(p.layout.parts)} in one tensor, but {name} is planned as"
                f" {getattr(values, name)} for {p.role} and {getattr(other, name)} for {part}: give them one value"
            )
    return values


def _same(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-12))


def _for_own_fan_in(plan: PlanData, p: ParamInfo, values: Values) -> Values:
    """f/f* in place of the width's ratio for a matrix whose fan-in f is not the width (f* = d*).

    The role's values have (d/d*)^n in them, n the power of ρ_d in the rule's cell; with (f/d)^n beside it that is (f/d*)^n.
    """
    values = _for_own_shape(plan, p, values)
    if not ROLES[p.role].reads_residual or p.fan_in == plan.target.width:
        return values
    row, ratio = plan.rule.rows[p.role], p.fan_in / plan.target.width
    changed = {
        name: None if value is None else value * ratio ** float(getattr(row, name).exponent("ρ_d"))
        for name, value in values.items()
    }
    return replace(values, **changed)


def _for_own_shape(plan: PlanData, p: ParamInfo, values: Values) -> Values:
    """Muon's rate for a matrix of another shape than planned: shared experts that lie in a tensor as one wide expert, low ranks.

    A down projection's rate goes with its fan-in (:func:`mue.rules.optimizers.for_optimizer`), and any rate with the shape in
    another convention than the spectral one; lr·wd stays.
    """
    if of_tuned(plan.tuned, p.role) != "muon" or p.layer is None:
        return values
    # of fused parts the first, which is moved by itself: the others are as large, or as planned
    role, own = ROLES[p.role], (matrices_of(plan, p)[2][0] if p.layout.parts else p.fan_out, p.fan_in)
    planned = matrix_shape(role, plan.target, plan.target.per_layer[p.layer])
    if own == planned:
        return values
    ratio = own[1] / planned[1] if role.kind == "shared" and role.part == "down" else 1.0
    to_ours = (lr_ratio("spectral", plan.tuned.update_scale, *shape) for shape in (own, planned))
    ratio *= next(to_ours) / next(to_ours)
    assert values.lr is not None and values.weight_decay is not None
    return replace(values, lr=values.lr * ratio, weight_decay=values.weight_decay / ratio)


def _constant(p: ParamInfo, planned: float | None, c: float) -> float | None:
    """Where a vector starts: the planned gain or zero, or, where the model's code says otherwise, as that does."""
    start = p.layout.start
    if start == "own" or not ROLES[p.role].trained:
        if c != 1:
            raise ValueError(f"{p.name} keeps the model's own start, and a multiplier {c:g} cannot be folded into it")
        return None
    assert planned is not None
    if not isinstance(start, float):
        return planned * c
    # what the code multiplies by must be the planned gain, so 1 + w wants w = c - 1 (docs/why/fold.md)
    if p.gain_offset or (ROLES[p.role].gain and start == 1):
        return planned * c - p.gain_offset
    return start * c
