"""A plan with forward multipliers ⇄ the same training without any, for stock forward code. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mue.plan.blocks import merge
from mue.plan.fold_table import fold_of
from mue.plan.plan import AnyPlan, PlanData
from mue.plan.transfer import plan_of
from mue.plan.values import BlockPlan, Folding, RolePlan, Values
from mue.rules.optimizers import of_tuned
from mue.util.text import number

ROUTES = ("weights", "model")


def fold(plan: AnyPlan, route: str = "weights") -> AnyPlan:
    """The plan with every multiplier inside a weight: init, lr, weight decay and eps change, the training does not.

    A·ρ_L^-α goes into the down projections, ρ_L^-α into the attention outputs, the head multiplier into the head, or, where
    the head is tied, into the gain of the final norm (which must then feed nothing but the head). R goes into the routed
    down projections (``route="weights"``), or stays for an engine that has a routed scaling factor (``"model"``: set that
    factor to the plan's ``route_scale``); never both. The softmax scale stays a setting of the model.

    On a model whose branches end in a norm (sandwich norms), what belongs to ρ_L^-α goes into that norm's gain instead
    (:class:`mue.layouts.layout.Layout`, ``after``). A plan that is folded already is returned as it is, if the route is the same.

    Args:
        plan: of any optimizer in :data:`mue.plan.fold_table.FOLDS`. route: who carries R, from :data:`ROUTES`.

    Returns:
        A plan of the class of ``plan``, with multipliers of 1 and c by block and role in ``folding``.

    Raises:
        ValueError: an unknown route, or a plan folded the other way.

    Source: docs/why/fold.md; :mod:`mue.plan.fold_table` for each optimizer.
    """
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)} (who carries R), got {route!r}")
    if plan.folding is not None:
        if plan.folding.route != route:
            raise ValueError(f"the plan is folded with R in the {plan.folding.route}: unfold it first")
        return plan
    coefficients = tuple(_coefficients(plan, block, route) for block in plan.blocks)
    blocks = tuple(
        replace(
            block,
            output_multiplier=1.0,
            route_scale=block.route_scale if route == "model" else 1.0,
            roles={r: _folded(plan, r, p, c.get(r, 1.0)) for r, p in block.roles.items()},
        )
        for block, c in zip(plan.blocks, coefficients, strict=True)
    )
    return replace(
        plan,
        blocks=blocks,
        roles=merge(blocks),
        residual_multiplier=1.0,
        head_multiplier=1.0,
        folding=Folding(route, coefficients),
    )


def unfold(plan: AnyPlan) -> AnyPlan:
    """The same plan with its forward multipliers.

    It is planned anew from its inputs, so that no factor is multiplied in and divided out, and hashes agree.

    Args:
        plan: one that is not folded is returned as it is.
    """
    return plan if plan.folding is None else plan_of(plan.inputs).like(plan)


def _coefficients(plan: PlanData, block: BlockPlan, route: str) -> Mapping[str, float]:
    """c of every role of one block that has one; the formula it is read from stands at :class:`Multipliers`."""
    branch = plan.residual_multiplier
    A, R = block.output_multiplier, block.route_scale
    found = {
        # A is the feed-forward's alone; both kinds of branch carry l^-α (docs/why/fold.md)
        "attention_o": branch,
        "ffn_down": branch * A,
        "shared_down": branch * A,
        "expert_down": branch * A * (R if route == "weights" else 1.0),
        # a tied head is the embedding too, which must stay: the gain before it takes c (docs/why/fold.md)
        "final_norm" if plan.target.tied else "head": plan.head_multiplier,
    }
    return {role: c for role, c in found.items() if c != 1 and block.roles[role].count}


def _folded(plan: PlanData, role: str, planned: RolePlan, c: float) -> RolePlan:
    if c == 1:
        return planned
    return replace(
        planned,
        values=folded_values(plan, role, planned.values, c),
        factor=folded_values(plan, role, planned.factor, c),
        formula={name: _formula(plan, role, name, text) for name, text in planned.formula.items()},
        constant=None if planned.constant is None else planned.constant * c,
        source=f"{planned.source}; folded with c = {number(c)}, docs/why/fold.md",
    )


def _powers(plan: PlanData, role: str) -> dict[str, int]:
    row = fold_of(of_tuned(plan.tuned, role))
    # The weight itself is c times as large under every optimizer; how it moves and decays is the optimizer's.
    return {"init_std": 1, "lr": row.lr, "weight_decay": row.weight_decay or 0, "eps": row.eps or 0}


def folded_values(plan: PlanData, role: str, values: Values, c: float) -> Values:
    """A role's values (or factors) with ``c`` folded into its weights.

    Args:
        plan: its optimizer decides the powers. role: by name. c: what the forward pass multiplied the weight by.

    Returns:
        Each number times its power of c (:mod:`mue.plan.fold_table`); None stays None.
    """
    powers = _powers(plan, role)
    return Values(**{name: None if v is None else v * c ** powers[name] for name, v in values.items()})


def _formula(plan: PlanData, role: str, name: str, text: str) -> str:
    power = _powers(plan, role)[name]
    return text if power == 0 else f"{text} · c" if power == 1 else f"{text} · c^{power}"


def state_powers(plan: PlanData, role: str) -> Mapping[str, int]:
    """By which power of c each tensor of optimizer state grows when c is folded into a weight of this role.

    Returns:
        torch's name of the state tensor → power; a name that is missing cannot be converted.
    """
    return fold_of(of_tuned(plan.tuned, role)).state
