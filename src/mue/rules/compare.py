"""Every rule on one target, side by side; one number step by step; all tables as a page. No torch, nothing printed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mue.inputs import Inputs
from mue.plan import Plan
from mue.planning import base_values
from mue.ratios import ratios
from mue.rules import RULES, get_rule, option_names
from mue.rules.algebra import RATIOS
from mue.rules.table import BUFFERS, CELLS, FALLBACK, FIELDS, ROLES, VECTORS, Row, Rule
from mue.shapes import Block, Transformer
from mue.words import nearest, number, text_table

# Whole-model factors that stand beside the roles in a comparison.
WHOLE = {
    "output_multiplier": "output multiplier A",
    "route_scale": "route scale R",
    "residual_multiplier": "residual multiplier",
    "head_multiplier": "head multiplier",
    "attention_scale": "attention scale",
    "one_minus_beta1": "1-β1",
}


@dataclass(frozen=True)
class Comparison:
    """Plans of every rule for one target; ``refused`` holds the reason of those that have none."""

    inputs: Inputs
    plans: dict[str, Plan]
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Factors by rule and role, plain; refused rules with their reason."""
        return {
            "target": self.inputs.target.name,
            "rules": {name: {"factors": self._factors(name), "whole": self._whole(name)} for name in self.plans},
            "refused": dict(self.refused),
        }

    def _roles(self) -> list[str]:
        counts = self.inputs.target.counts()
        return [role for role in ROLES if counts.get(role) and role not in BUFFERS]

    def _factors(self, name: str) -> dict[str, dict[str, Any]]:
        plan = self.plans[name]
        out = {}
        for role in self._roles():
            planned = plan.roles[role]
            cells: dict[str, Any] = dict(planned.factor.items())
            if role in VECTORS:
                del cells["init_std"], cells["weight_decay"]
            unknown = [f for f in cells if planned.formula.get(f) == "?"]
            out[role] = {**cells, "init": planned.init, "unknown": unknown, "status": planned.status}
        return out

    def _whole(self, name: str) -> dict[str, float | None]:
        plan = self.plans[name]
        whole: dict[str, float | None] = {k: getattr(plan, k) for k in WHOLE if hasattr(plan, k)}
        return {**whole, "one_minus_beta1": (1 - plan.betas[0]) / (1 - _base_beta(plan))}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: one line per role and number, one column per rule that has an answer."""
        factors = {name: self._factors(name) for name in self.plans}
        rows = [[WHOLE[key], "", *(_cell(self._whole(name)[key], False) for name in self.plans)] for key in WHOLE]
        for role in self._roles():
            for field in FIELDS:
                if field not in next(iter(factors.values()), {role: {}})[role]:
                    continue
                row = [
                    role if field in ("init_std", "lr") and (field == "init_std" or role in VECTORS) else "",
                    CELLS[field],
                ]
                for name in self.plans:
                    f = factors[name][role]
                    text = _cell(f[field], field in f["unknown"])
                    row.append(
                        f"{text} {f['init']}" if field == "init_std" and f["init"] in ("zero", "shared") else text
                    )
                rows.append(row)
        return ["role", "factor on", *self.plans], rows


def _cell(value: float | None, unknown: bool) -> str:
    return "?" if unknown else number(value)


def _base_beta(plan: Plan) -> float:
    base = plan.inputs.base
    return base.betas[0] if isinstance(base, Plan) else plan.tuned.betas[0]


def compare(inputs: Inputs, rules: Sequence[str] | None = None) -> Comparison:
    """Every rule's plan for the same base, target, runs and tuned values.

    Options of ``inputs`` go to the rules that have them. A rule with no answer is listed with its reason.

    Raises:
        ValueError: an unknown rule; or if not even the rule of ``inputs`` has an answer, its own reason.
    """
    plans: dict[str, Plan] = {}
    refused: dict[str, str] = {}
    for name in rules if rules is not None else RULES:
        if name not in RULES:
            raise ValueError(f"unknown rule {name!r}{nearest(name, RULES)}")
        has = option_names(RULES[name])
        own = replace(
            inputs,
            rule=name,
            depth_exponent=inputs.depth_exponent if "depth_exponent" in has else None,
            options={k: v for k, v in inputs.options.items() if k in has},
        )
        try:
            plans[name] = own.plan()
        except ValueError as error:
            if name == inputs.rule:
                raise
            refused[name] = str(error).split(": ", 1)[-1] if "cannot plan" in str(error) else str(error)
    return Comparison(inputs, plans, refused)


def lines(made: Comparison) -> str:
    """A comparison as plain text: the table, then who refused and why."""
    header, rows = made.table()
    text = f"{made.inputs.target.name}, factors on the tuned values (multipliers, R and attention scale: as they are)\n\n{text_table(header, rows)}"
    reasons = [[name, reason] for name, reason in made.refused.items()]
    return f"{text}\n\n{text_table(['refused', 'because'], reasons)}" if reasons else text


# ---- one number ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of a derivation: of which number, what happens, the value after it, and the source."""

    number: str
    text: str
    value: float
    source: str


def why(plan: Plan, role: str, layer: int | None = None) -> list[Step]:
    """How each number of a role came about: tuned value, habits of the base, every ratio by name, product, fold.

    Args:
        role: from :data:`mue.rules.table.ROLES`. layer: needed where blocks differ; the first that has the role otherwise.

    Raises:
        ValueError: an unknown role, or one the target does not have.
    """
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}{nearest(role, ROLES)}")
    index = _block_of(plan, role, layer)
    block = plan.target.blocks[index]
    if not plan.blocks[index].roles[role].count:
        held = [r for r, p in plan.roles.items() if p.count]
        raise ValueError(f"{plan.target.name} has no {role}{nearest(role, held)}")
    if role in BUFFERS:
        return [
            Step(
                "init std",
                "starts at 0 and is moved by load statistics, not by the optimizer",
                0.0,
                plan.rule.rows[role].source,
            )
        ]
    steps: list[Step] = []
    for field in FIELDS:
        steps += _derivation(plan, role, block, index, field)
    return steps


def why_lines(role: str, steps: Sequence[Step]) -> str:
    """A derivation as plain text, one line per step."""
    rows = [[s.number, s.text, f"{s.value:.6g}", s.source] for s in steps]
    return f"{role}\n\n{text_table(['number', 'step', 'value', 'source'], rows)}"


def _block_of(plan: Plan, role: str, layer: int | None) -> int:
    if layer is None:
        return next((i for i, b in enumerate(plan.blocks) if b.roles[role].count), 0)
    plan.role(role, layer)  # checks the layer
    ends = [sum(b.layers for b in plan.blocks[: i + 1]) for i in range(len(plan.blocks))]
    return next(i for i, end in enumerate(ends) if layer < end)


def _derivation(plan: Plan, role: str, block: Block, index: int, field: str) -> Iterator[Step]:
    planned, name, row = plan.blocks[index].roles[role], CELLS[field], plan.rule.rows[role]
    final = getattr(planned.values, field)
    if role in VECTORS and field == "init_std":
        constant = planned.constant or 0.0
        yield Step(
            "start",
            f"a {'bias' if role == 'bias' else 'gain'} starts at {number(constant)}",
            constant,
            "CompleteP Table 1",
        )
        return
    if role in VECTORS and field == "weight_decay":
        yield Step(name, "gains and biases are not decayed", 0.0, "CompleteP Table 1")
        return
    value = yield from _star(plan, role, field)
    if field in row.unknown:
        yield Step(name, f"{plan.rule.name} does not give it: left as tuned", value, row.source)
    here = _ratios(plan, block, role)
    cell = getattr(row, field)
    if cell.coefficient != 1:
        value *= float(cell.coefficient)
        yield Step(name, f"× {cell.coefficient}", value, row.source)
    for ratio_name, power in cell.exponents:
        factor = here[ratio_name] ** float(power)
        value *= factor
        written = ratio_name if power == 1 else f"{ratio_name}^{power}"
        source = plan.rule.source_of(role, field, ratio_name)
        yield Step(name, f"× {written} = {number(factor)}, for {_meaning(ratio_name, here)}", value, source)
    if plan.folding is not None and (c := plan.folding.coefficients[index].get(role)):
        yield Step(
            name, f"folded with c = {number(c)}", final, f"mue.fold.table, {plan.tuned.optimizer}; conventions 7"
        )
        value = final
    assert math.isclose(value, final, rel_tol=1e-9, abs_tol=1e-300), f"{role}.{field}: {value} derived, {final} planned"


def _star(plan: Plan, role: str, field: str) -> Any:
    """The base's value as a step, and returned."""
    base, name = plan.inputs.base, CELLS[field]
    if isinstance(base, Plan):
        value = getattr(base.roles[role].values, field)
        yield Step(name, f"the base plan's value of {role}", value, f"plan {base.hash}")
        return value
    tuned, habit = plan.tuned, plan.inputs.convention
    source = role if field in tuned.roles.get(role, {}) else FALLBACK.get(role, role)
    own = field in tuned.roles.get(source, {})
    raw = tuned.roles[source][field] if own else getattr(tuned, field)
    yield Step(name, f"tuned{f'.roles.{source}' if own else ''}.{field} on {base.name}", raw, "the sweep on the base")
    value = getattr(base_values(role, base, tuned, habit, None), field)
    if field == "weight_decay" and habit.weight_decay == "independent":
        yield Step(
            name, "/ lr: the base decays independently, torch's form multiplies by lr", value, "[base.convention]"
        )
    elif value != raw:
        yield Step(name, f"/ √(2·{base.layers}): the base draws o and down so", value, "[base.convention]")
    return value


def _ratios(plan: Plan, block: Block, role: str) -> dict[str, float]:
    base = plan.inputs.base
    shape = base if isinstance(base, Transformer) else base.target
    before = plan.inputs.base_training if isinstance(base, Transformer) else base.training
    return ratios(shape, plan.target, block, before, plan.training, "shared" if role.startswith("shared") else "")


def _meaning(name: str, here: dict[str, float]) -> str:
    return f"{name} = {number(here[name])}, {RATIOS[name]}"


# ---- formulas of a rule ----------------------------------------------------------------------------------------------


def formulas(rule: Rule) -> list[list[str]]:
    """A rule's table as text: role, the four formulas, mark and source; equal rows together."""
    rows: list[list[str]] = []
    for role in ROLES:
        row = rule.rows.get(role)
        if row is None or role in BUFFERS:
            continue
        cells = ["?" if f in row.unknown else str(getattr(row, f)) for f in FIELDS]
        if row.init == "shared":
            cells[0] += " (shared)"
        if role in VECTORS:
            cells[0] = cells[2] = "–"
        rest = [*cells, _marks(role, row), row.source]
        if rows and rows[-1][1:] == rest:
            rows[-1][0] += f", {role}"
        else:
            rows.append([role, *rest])
    return rows


def _marks(role: str, row: Row) -> str:
    """``"published"``, or ``"published: init std, lr; inferred: eps"`` where the cells differ."""
    by_mark: dict[str, list[str]] = {}
    for cell in FIELDS:
        if role not in VECTORS or cell in ("lr", "eps"):
            by_mark.setdefault(row.mark(cell), []).append(CELLS[cell])
    if len(by_mark) == 1:
        return next(iter(by_mark))
    return "; ".join(f"{mark}: {', '.join(cells)}" for mark, cells in by_mark.items())


def all_rules() -> list[Rule]:
    """Every rule with its default options."""
    return [get_rule(name) for name in RULES]
