"""Every rule on one target, side by side, and the formulas of each. No torch, nothing printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mue.plan.base import base_of
from mue.plan.laws import Answer, Exponents, answers, neighbours
from mue.plan.plan import Inputs, PlanData
from mue.plan.ratios import ratios
from mue.plan.transfer import plan_of
from mue.rules import RULES, get_rule, option_names
from mue.rules.roles import ROLES
from mue.rules.table import CELLS, FIELDS, Row, Rule
from mue.util.text import number, text_table, wrapped

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
    """Plans of every rule for one target; ``refused`` holds the reason of those that have none.

    ``laws`` is what fitted laws set for it, ``exponents`` the rule's of batch and duration beside those of others.
    """

    inputs: Inputs
    plans: dict[str, PlanData]
    refused: dict[str, str]
    laws: tuple[Answer, ...] = ()
    exponents: tuple[Exponents, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Factors by rule and role, plain; refused rules with their reason."""
        return {
            "target": self.inputs.target.name,
            "rules": {name: {"factors": self._factors(name), "whole": self._whole(name)} for name in self.plans},
            "refused": dict(self.refused),
            "laws": [asdict(answer) for answer in self.laws],
            "exponents": [asdict(one) for one in self.exponents],
        }

    def _roles(self) -> list[str]:
        counts = self.inputs.target.counts()
        return [role for role in ROLES if counts.get(role) and ROLES[role].trained]

    def _factors(self, name: str) -> dict[str, dict[str, Any]]:
        plan = self.plans[name]
        out = {}
        for role in self._roles():
            planned = plan.roles[role]
            cells: dict[str, Any] = dict(planned.factor.items())
            if ROLES[role].vector:
                # a gain or bias starts at a constant and is not decayed, under every rule
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
                    role if field in ("init_std", "lr") and (field == "init_std" or ROLES[role].vector) else "",
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

    def law_rows(self) -> list[list[str]]:
        """A line for each number that a law sets or refuses: its name, the number, what it says."""
        rows: list[list[str]] = []
        for answer in self.laws:
            repeated = bool(rows) and self.laws[len(rows) - 1].law == answer.law
            rows.append(["" if repeated else answer.law, answer.sets, answer.text])
        return rows

    def exponent_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the exponents of batch and duration, with the factor on lr that they give here."""
        rows = [
            [e.whose, *("–" if x is None else f"{x:g}" for x in (e.p, e.q)), number(e.factor), e.source]
            for e in self.exponents
        ]
        return ["lr × ρ_B^p · ρ_D^-q", "p", "q", "here", "source"], rows


def _cell(value: float | None, unknown: bool) -> str:
    return "?" if unknown else number(value)


def _base_beta(plan: PlanData) -> float:
    base = plan.inputs.base
    return base.betas[0] if isinstance(base, PlanData) else plan.tuned.betas[0]


def compare(inputs: Inputs, rules: Sequence[str] | None = None) -> Comparison:
    """Every rule's plan for the same base, target, runs and tuned values.

    A rule with no answer is listed with its reason.

    Args:
        inputs: of one plan; their options go to the rules that have them, and their own rule must have an answer.
        rules: names, in the order of the columns; None: all.

    Raises:
        ValueError: an unknown rule; or if not even the rule of ``inputs`` has an answer, its own reason.
    """
    plans: dict[str, PlanData] = {}
    refused: dict[str, str] = {}
    for name in rules if rules is not None else RULES:
        has = option_names(RULES.lookup(name))
        # an option that this rule lacks is left out here: for one plan alone it would be an error
        own = replace(
            inputs,
            rule=name,
            options={k: v for k, v in inputs.options.items() if k in has},
        )
        try:
            plans[name] = plan_of(own)
        except ValueError as error:
            if name == inputs.rule:
                raise
            # The reason alone: "rule … cannot plan … → …" before it is what the table's row and title say.
            refused[name] = str(error).split(": ", 1)[-1] if "cannot plan" in str(error) else str(error)
    base = base_of(inputs)
    ratio = ratios(base.shape, inputs.target, inputs.target.blocks[0], base.training, inputs.training)
    exponents = neighbours(plans[inputs.rule].rule, ratio) if inputs.rule in plans else []
    return Comparison(inputs, plans, refused, tuple(answers(inputs)), tuple(exponents))


WIDTH = 100  # columns of what is printed, where no table is wider by itself


def comparison_text(made: Comparison) -> str:
    """A comparison as plain text: the table with the laws under it, exponents of the run, then who refused and why.

    Args:
        made: by :func:`compare`.
    """
    header, rows = made.table()
    title = f"{made.inputs.target.name}, factors on the tuned values (multipliers, R and attention scale: as they are)"
    below = [["fitted law", "sets", "for all parameters, standard parametrization"], *made.law_rows()]
    parts = [title, text_table(header, rows, below)]
    if made.exponents:
        columns, lines = made.exponent_table()
        parts.append(text_table(columns[:-1], [line[:-1] for line in lines]))
    if made.refused:
        wide = max(map(len, made.refused))
        head = f"{'refused':<{wide}}  because\n{'─' * wide}  {'─' * (WIDTH - wide - 2)}"
        reasons = [wrapped(f"{name:<{wide}}  ", reason, WIDTH) for name, reason in made.refused.items()]
        parts.append("\n".join([head, *reasons]))
    return "\n\n".join(parts)


# ---- formulas of a rule ----------------------------------------------------------------------------------------------


def formulas(rule: Rule) -> list[list[str]]:
    """A rule's table as text: role, the four formulas, mark and source; equal rows together."""
    rows: list[list[str]] = []
    for role in ROLES:
        row = rule.rows.get(role)
        if row is None or not ROLES[role].trained:
            continue
        cells = ["?" if f in row.unknown else str(getattr(row, f)) for f in FIELDS]
        if row.init == "shared":
            cells[0] += " (shared)"
        if ROLES[role].vector:
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
        if not ROLES[role].vector or cell in ("lr", "eps"):
            by_mark.setdefault(row.mark(cell), []).append(CELLS[cell])
    if len(by_mark) == 1:
        return next(iter(by_mark))
    return "; ".join(f"{mark}: {', '.join(cells)}" for mark, cells in by_mark.items())


def all_rules() -> list[Rule]:
    """Every rule with its default options."""
    return [get_rule(name) for name in RULES]
