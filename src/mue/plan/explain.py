"""One number of a plan step by step: tuned value, per-role values, habits, every ratio by name, fold. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from mue.plan import laws, per_role
from mue.plan.base import base_of
from mue.plan.plan import PlanData
from mue.plan.ratios import base_block, ratios
from mue.plan.steps import Step, Steps
from mue.plan.update_scale import lr_factor
from mue.rules.algebra import ONE, RATIOS, Monomial
from mue.rules.laws.law import LAWS
from mue.rules.roles import ROLES
from mue.rules.sde import INVARIANTS
from mue.rules.table import CELLS, FIELDS
from mue.shapes import Block, Transformer
from mue.shapes.update_scales import UPDATE_SCALES
from mue.util.errors import nearest
from mue.util.text import number

# Numbers of the whole model: attribute of a plan → where a fold puts it.
WHOLE = {
    "output_multiplier": "the down projections",
    "route_scale": "the routed down projections",
    "residual_multiplier": "o and the down projections",
    "head_multiplier": "the head, or the final norm where it is tied",
    "attention_scale": "",
}


RUN = "run"  # the factors of batch and duration, and what they keep


def why(plan: PlanData, name: str, layer: int | None = None) -> list[Step]:
    """How each number of a role, or one of :data:`WHOLE`, came about.

    Where blocks differ in it, every kind of block is derived, its layers beside the number, or only that of ``layer``.

    Args:
        name: from :data:`mue.rules.roles.ROLES` or :data:`WHOLE`, or :data:`RUN`, or a fitted law of :data:`mue.rules.laws.law.LAWS`.

    Raises:
        ValueError: an unknown name, a role the target does not have, a layer that does not exist.
    """
    if name == RUN:
        return list(_run(plan))
    if name not in (*plan.roles, *WHOLE):
        if name in LAWS:
            return list(laws.derivation(plan.inputs, name))
        raise ValueError(f"unknown role {name!r}{nearest(name, (*plan.roles, *WHOLE, RUN, *LAWS))}")
    indices = range(len(plan.blocks)) if layer is None else [plan.block_of(layer)]
    held = [i for i in indices if name in WHOLE or plan.blocks[i].roles[name].count]
    if not held:
        roles = [r for r, p in plan.roles.items() if p.count]
        raise ValueError(f"{plan.target.name} has no {name}{nearest(name, roles)}")
    distinct: dict[object, int] = {}
    for i in held:
        block = plan.blocks[i]
        value = getattr(block, name, None) if name in WHOLE else (block.roles[name].values, block.roles[name].constant)
        distinct.setdefault(value, i)
    found = []
    for i in distinct.values():
        steps = list(_whole(plan, name, i) if name in WHOLE else _role(plan, name, i))
        mark = f" [{plan.layers_of(i)}]" if len(distinct) > 1 else ""
        found += [replace(s, number=f"{s.number}{mark}") for s in steps]
    return found


def _block_behind(plan: PlanData, index: int) -> tuple[Block, str]:
    """The target's block behind a plan's, and the third of the depth it stands for."""
    return list(per_role.split_by_third(plan.target, plan.tuned))[index]


# ---- a role ----------------------------------------------------------------------------------------------------------


def _role(plan: PlanData, role: str, index: int) -> Iterator[Step]:
    if not ROLES[role].trained:
        text = "starts at 0 and is moved by load statistics, not by the optimizer"
        yield Step("init std", text, 0.0, plan.rule.rows[role].source)
        return
    for field in FIELDS:
        yield from _cell(plan, role, index, field)


def _cell(plan: PlanData, role: str, index: int, field: str) -> Iterator[Step]:
    """One number of a role: the base's value, the factor of every ratio in the row's cell, then the fold."""
    planned, name, row = plan.blocks[index].roles[role], CELLS[field], plan.rule.rows[role]
    final = getattr(planned.values, field)
    if ROLES[role].vector and field == "init_std":
        constant = planned.constant or 0.0
        text = f"a {'bias' if role == 'bias' else 'gain'} starts at {number(constant)}"
        yield Step("start", text, constant, "CompleteP Table 1")
        return
    if ROLES[role].vector and field == "weight_decay":
        yield Step(name, "gains and biases are not decayed", 0.0, "CompleteP Table 1")
        return
    block, third = _block_behind(plan, index)
    value = yield from _base_value(plan, role, field, third)
    if field in row.unknown:
        yield Step(name, f"{plan.rule.name} does not give it: left as tuned", value, row.source)
    sources = {ratio: plan.rule.source_of(role, field, ratio) for ratio in RATIOS}
    kind = "shared" if ROLES[role].kind == "shared" else ""
    here = _ratios(plan, block, kind)
    value = yield from _product(name, getattr(row, field), here, value, sources, row.source)
    value = yield from _scale(plan, role, name, field, block, value)
    yield from _left(plan, name, field, getattr(row, field), here, value)
    if plan.folding is not None and (c := plan.folding.coefficients[index].get(role)):
        source = f"mue.plan.fold_table, {plan.tuned.optimizer}; docs/why/fold.md"
        yield Step(name, f"folded with c = {number(c)}", final, source)
        value = final
    _agree(f"{role}.{field}", value, final)


def _scale(plan: PlanData, role: str, name: str, field: str, block: Block, value: float) -> Steps:
    """The convention that Muon's rates are stated in: another number for the same step of a matrix of another shape."""
    shape = base_of(plan.inputs).shape
    κ = lr_factor(role, plan.tuned, (shape, base_block(shape)), (plan.target, block))
    if κ == 1 or field not in ("lr", "weight_decay"):
        return value
    one, rule = plan.tuned.update_scale, UPDATE_SCALES[plan.tuned.update_scale]
    value = value * κ if field == "lr" else value / κ
    text = (
        f"× κ{'' if field == 'lr' else '^-1'}, κ = {number(κ)}: update_scale = {one}, {rule.formula} of both matrices"
    )
    yield Step(name, text, value, rule.source)
    return value


def _left(
    plan: PlanData, name: str, field: str, cell: Monomial, here: dict[str, float], value: float
) -> Iterator[Step]:
    """Batch or duration that change, where a choice of the rule leaves a number as it is: that is a step as well."""
    chosen = plan.rule.run.chosen.get(field) if plan.rule.run is not None else None
    for ratio in ("ρ_B", "ρ_D"):
        if chosen and here[ratio] != 1 and not cell.exponent(ratio):
            text = f"left as it is, for {ratio} = {number(here[ratio])}, {RATIOS[ratio]}"
            yield Step(name, text, value, chosen)


def _base_value(plan: PlanData, role: str, field: str, third: str) -> Steps:
    """The base's value step by step, and returned."""
    base, name = plan.inputs.base, CELLS[field]
    if isinstance(base, PlanData):
        known: float = getattr(per_role.planned_values(base, role, third), field)
        yield Step(name, f"the base plan's value of {role}", known, f"plan {base.hash}")
        return known
    tuned, habit = plan.tuned, plan.inputs.convention
    (start, value), *times = per_role.overrides(tuned, role, field, third)
    yield Step(name, f"{start} on {base.name}", value, "the sweep on the base")
    for where, factor in times:
        value *= factor
        yield Step(name, f"× {number(factor)}, {where}", value, "per-role tuning on the base")
    final: float = getattr(per_role.base_values(role, base, tuned, habit, third), field)
    if field == "weight_decay" and habit.weight_decay == "independent":
        text = "/ lr: the base decays independently, torch's form multiplies by lr"
        yield Step(name, text, final, "[base.convention]")
    # Anything beyond rounding is the only habit left: the init that falls with depth.
    elif not math.isclose(final, value, rel_tol=1e-12):
        yield Step(name, f"/ √(2·{base.layers}): the base draws o and down so", final, "[base.convention]")
    return final


# ---- the whole model -------------------------------------------------------------------------------------------------


def _whole(plan: PlanData, name: str, index: int) -> Iterator[Step]:
    """One number of the whole model. R is absolute, so it starts from nothing; the others start from the base's own."""
    base, rule, block = plan.inputs.base, plan.rule, _block_behind(plan, index)[0]
    label = name.replace("_", " ")
    final: float = getattr(plan.blocks[index] if hasattr(plan.blocks[index], name) else plan, name)
    if name == "route_scale":
        value, text = 1.0, "no routed sum, or a rule that leaves it as it is"
        if rule.routed and block.experts:
            value = block.route_scale
            text = f"a = {block.active} active experts on the normalised routed sum, absolute"
            if block.moments:
                whose = "measured" if block.gate_moments else f"{block.router} router's"
                text = f"ā/m1 = {block.active}/{number(block.moments[0])} of the {whose} gates, absolute"
        yield Step(label, text, value, rule.source)
    elif name == "attention_scale":
        value = yield from _attention(plan)
    else:
        start = getattr(base, name, 1.0)
        assert isinstance(start, float)
        yield Step(
            label, f"the base's own, {base.name if isinstance(base, Transformer) else base.hash}", start, "the base"
        )
        value = yield from _product(
            label, getattr(rule, name), _ratios(plan, block), start, dict(rule.axes), rule.source
        )
    if plan.folding is not None and final != value:
        yield Step(label, f"folded into {WHOLE[name]}", final, "docs/why/fold.md")
        value = final
    _agree(name, value, final)


def _attention(plan: PlanData) -> Steps:
    """The attention scale: the base's habit, carried over a change of head size (docs/why/index.md#attention)."""
    base, exponent = plan.inputs.base, plan.rule.attention_exponent
    if isinstance(base, PlanData):
        start, shape, text = base.attention_scale, base.target, f"that of plan {base.hash}"
    else:
        habit = plan.inputs.convention
        start, shape, text = habit.scale(base.head_dim), base, f"{habit.attention_scale}, the base's habit"
    yield Step("attention scale", f"{text}, heads of {shape.head_dim}", start, "[base.convention]")
    value: float = start * (shape.head_dim / plan.target.head_dim) ** float(exponent)
    ratio = f"({shape.head_dim}/{plan.target.head_dim})"
    text = f"× {ratio if exponent == 1 else f'{ratio}^{exponent}'}, head size"
    yield Step("attention scale", text, value, "docs/why/index.md#attention")
    return value


def _run(plan: PlanData) -> Iterator[Step]:
    """What a change of batch and duration does: the factors, Adam's betas, and what of the base's run is kept by them."""
    rule, run, ratio = plan.rule, plan.rule.run, _ratios(plan, plan.target.blocks[0])
    if run is None:
        yield Step("run", f"{rule.name} has no SDE rule: what moves with the run stands in each role", 1.0, rule.source)
        return
    chosen, table = dict(run.chosen), rule.axes.get("ρ_B", rule.source)
    for cell in ("lr", "weight_decay", "eps"):
        factor: Monomial = getattr(run, cell)
        yield Step(CELLS[cell], f"× {factor}", factor(ratio), chosen.get(cell, table))
    of_betas = run.chosen_betas or table
    how = "β to the power of" if run.betas == "power" else "1-β ×"
    for i, beta in enumerate(plan.betas, start=1):
        yield Step(f"beta{i}", f"{how} {run.one_minus_beta}", beta, of_betas)
    for name, change in run.changes().items():
        text = "kept" if change == ONE else f"× {change}"
        first_order = ", to first order" if run.betas == "power" and "β" in name else ""
        yield Step(name, text + first_order, change(ratio), INVARIANTS[name])
    for other in laws.neighbours(rule, ratio)[1:]:
        p, q = ("–" if e is None else f"{e:g}" for e in (other.p, other.q))
        yield Step("lr elsewhere", f"{other.whose}: p = {p}, q = {q}", other.factor, other.source)


# ---- common ----------------------------------------------------------------------------------------------------------


def _product(
    name: str, cell: Monomial, here: dict[str, float], value: float, sources: dict[str, str], source: str
) -> Steps:
    """``value`` times every factor of a monomial, one step each."""
    if cell.coefficient != 1:
        value *= float(cell.coefficient)
        yield Step(name, f"× {cell.coefficient}", value, source)
    for ratio, power in cell.exponents:
        factor = here[ratio] ** float(power)
        value *= factor
        written = ratio if power == 1 else f"{ratio}^{power}"
        meaning = f"{ratio} = {number(here[ratio])}, {RATIOS[ratio]}"
        yield Step(name, f"× {written} = {number(factor)}, for {meaning}", value, sources.get(ratio, source))
    return value


def _ratios(plan: PlanData, block: Block, kind: str = "") -> dict[str, float]:
    base = base_of(plan.inputs)
    return ratios(base.shape, plan.target, block, base.training, plan.training, kind)


def _agree(name: str, derived: float, planned: float) -> None:
    """The steps shown give the plan's number, or one of the two is wrong (1e-9: the same factors in another order)."""
    assert math.isclose(derived, planned, rel_tol=1e-9, abs_tol=1e-300), f"{name}: {derived} derived, {planned} planned"
