"""A plan by role, without a model: for files whose users say themselves which of their arrays is what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from mue.export.skeleton import fans
from mue.plan.fold import folded_values
from mue.plan.plan import PlanData
from mue.plan.update_scale import matrix_shape
from mue.rules.optimizers import of_tuned
from mue.rules.roles import ROLES
from mue.shapes.update_scales import update_scale


@dataclass(frozen=True)
class RoleRow:
    """One role in some layers.

    Attributes:
        role: of a plan; or ``"position"``, a table of positions; or ``"bias of ROLE"``, a bias beside a weight with a coefficient.
        layers: in which it holds; None outside the blocks.
        lr, weight_decay: absolute; of a matrix that Muon moves lr·s and wd/s of W ← W·(1 - lr·wd) - lr·s·Q.
        std, constant: of a normal draw, or where a vector starts. folded: what the fold multiplied its weights by.
        fan_in, fan_out: of one matrix; None: not asked. elements: of one layer, all experts together; None: it may be missing.
        muon: Muon moves it, not AdamW.
    """

    role: str
    layers: tuple[int, ...] | None
    lr: float
    weight_decay: float
    eps: float
    std: float | None
    constant: float | None
    folded: float
    fan_in: int | None
    fan_out: int | None
    elements: int | None
    muon: bool


def role_rows(plan: PlanData) -> list[RoleRow]:
    """Rows for everything that the planned shape has, and for what a model may have besides (positions, biases).

    Args:
        plan: folded, for AdamW or Muon.
    """
    rows: list[RoleRow] = []
    for name in plan.roles:
        role = ROLES[name]
        if role.inside and role.trained and name != "bias":
            rows += _by_layer(plan, name)
        elif not role.inside and plan.roles[name].count:
            rows.append(_row(plan, name))
    # a table of positions is drawn and moved like the embedding, and has as many rows as the longest sequence, which no plan knows
    position = replace(_row(plan, "embedding"), role="position", fan_in=None, elements=None)
    return [*rows, position, *_by_layer(plan, "bias"), *_biases(plan)]


def _by_layer(plan: PlanData, role: str) -> list[RoleRow]:
    """One row for each distinct setting of a role, with the layers that have it."""
    here = (layer for layer in range(plan.target.layers) if role == "bias" or plan.role(role, layer).count)
    return _merged((_row(plan, role, layer), layer) for layer in here)


def _merged(found: Iterator[tuple[RoleRow, int]]) -> list[RoleRow]:
    layers: dict[RoleRow, list[int]] = {}
    for row, layer in found:
        layers.setdefault(row, []).append(layer)
    return [replace(row, layers=tuple(where)) for row, where in layers.items()]


def _biases(plan: PlanData) -> list[RoleRow]:
    """A bias beside a folded weight has that weight's coefficient, so that there is a row for each of these roles."""
    folds = [_coefficients(plan, layer) for layer in range(plan.target.layers)]
    roles = dict.fromkeys(role for fold in folds for role in fold)
    return [
        replace(row, role=f"bias of {role}")
        for role in roles
        for row in _merged((_row(plan, "bias", i, fold[role]), i) for i, fold in enumerate(folds) if role in fold)
    ]


def _row(plan: PlanData, role: str, layer: int | None = None, c: float | None = None) -> RoleRow:
    """A role's row in one layer; ``c``: of a bias, what is folded into it beyond the plan's own fold."""
    planned, kind, block = plan.role(role, layer), ROLES[role], plan.target.per_layer[layer or 0]
    v = planned.values if c is None else folded_values(plan, role, planned.values, c)
    assert v.lr is not None and v.weight_decay is not None and v.eps is not None
    folded = _coefficients(plan, layer).get(role, 1.0) if c is None else c
    muon = of_tuned(plan.tuned, role) == "muon"
    # the scale by shape goes into the rate, where every convention of it is one number
    s = update_scale(plan.tuned.update_scale).factor(*matrix_shape(kind, plan.target, block)) if muon else 1.0
    setting = v.lr * s, v.weight_decay / s, v.eps
    if not kind.drawn:
        # on a tied, folded plan the final norm's gain carries the head's multiplier, so that it may not be missing
        elements = plan.target.width if role == "final_norm" and folded != 1 else None
        return RoleRow(role, None, *setting, None, planned.constant, folded, None, None, elements, muon)
    fan_in, fan_out = fans(role, plan.target, block)
    elements = fan_in * fan_out * (block.experts if kind.kind == "expert" else 1)
    sizes: tuple[int | None, int | None] = (fan_in, fan_out)
    if kind.kind == "shared":
        # n_s of width h_s or one of n_s·h_s: AdamW's values are the same, and only the sum is asked for; Muon's go with the width
        one_out, one_in = matrix_shape(kind, plan.target, block)
        free = (None, fan_out) if kind.part == "down" else (fan_in, None)
        sizes = (one_in, one_out) if muon else free
    return RoleRow(role, None, *setting, v.init_std, None, folded, *sizes, elements, muon)


def _coefficients(plan: PlanData, layer: int | None) -> Mapping[str, float]:
    """What the fold multiplied weights by, by role; outside the blocks every block says the same."""
    assert plan.folding is not None  # what is written is folded
    return plan.folding.coefficients[0 if layer is None else plan.block_of(layer)]
