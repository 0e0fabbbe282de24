"""One block of a plan: every role's value by the rule's table, and the two multipliers of its feed-forward branch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mue.plan.base import Base
from mue.plan.ratios import base_block, ratios
from mue.plan.update_scale import lr_factor
from mue.plan.values import NOTHING, BlockPlan, RolePlan, Values
from mue.rules.algebra import Monomial
from mue.rules.roles import Role, roles_of
from mue.rules.table import FIELDS, NORMAL, ZERO_INIT, Row, Rule
from mue.shapes import Block, Training, Transformer


@dataclass(frozen=True)
class Transition:
    """From which shape and run to which: all that a rule's factors follow from."""

    base: Transformer
    target: Transformer
    base_training: Training | None
    training: Training | None

    def ratios(self, block: Block, kind: str = "") -> dict[str, float]:
        """Every ratio for one block of the target; see :func:`mue.plan.ratios.ratios`."""
        return ratios(self.base, self.target, block, self.base_training, self.training, kind)


def block_plan(rule: Rule, transition: Transition, base: Base, block: Block, third: str) -> BlockPlan:
    """The plan of one kind of block.

    Args:
        rule: read for the base's optimizer already. transition: from which shape and run to which.
        base: whose tuned values are multiplied. block: of the target.
        third: the part of the depth that it lies in, where that has tuned values of its own, or ``""``.

    Raises:
        ValueError: a base plan that has no layer in that third.
    """
    counts = transition.target.counts()
    # They differ in whose fan-in ρ_H speaks of: a table that has it in a down projection's row wants the shared one's.
    ratio, of_shared = (
        transition.ratios(block),
        transition.ratios(block, "shared"),
    )
    roles = {
        name: _role_plan(
            role,
            rule,
            base.values(name, third),
            of_shared if role.kind == "shared" else ratio,
            counts.get(name, 0) if role.present(block) else 0,
            base.own_values(name, third),
            lr_factor(name, base.tuned, (transition.base, base_block(transition.base)), (transition.target, block)),
        )
        for name, role in roles_of(transition.target).items()
    }
    return BlockPlan(
        block.layers,
        block.notation,
        block.active_width,
        # A = A*/ρ_e: a branch of more active width adds up more terms (docs/why/index.md#active-width).
        output_multiplier=base.output_multiplier * rule.output_multiplier(ratio),
        # R = a: the gates sum to one, so the routed sum is an average over a experts, and R makes it a sum again.
        route_scale=block.route_scale if rule.routed else 1.0,
        drift=_drift(rule, transition, block, ratio),
        roles=roles,
    )


def _drift(rule: Rule, transition: Transition, block: Block, ratio: Mapping[str, float]) -> dict[str, float | None]:
    """What moves although every factor is applied; reported, not corrected (docs/why/limits.md#drift)."""
    # σ0, the noise of one step, falls with 1/√(tokens seen): all of them, or a routed expert's share a/N.
    share = block.share / base_block(transition.base).share
    return {
        "sigma0_experts": (ratio["ρ_D"] * share) ** -0.5,
        "sigma0_other": ratio["ρ_D"] ** -0.5,
        "up_gate": None if rule.up_gate is None else rule.up_gate(ratio),
    }


def _role_plan(
    role: Role, rule: Rule, base_values: Values, ratio: Mapping[str, float], count: int, own_values: str, scale: float
) -> RolePlan:
    """One role: the base's values times the factors of its row; of a role without a row, that there is no answer.

    ``scale`` is κ of :mod:`mue.plan.update_scale`: another number for the same step.
    """
    row = rule.rows.get(role.name)
    if row is None:
        # the balance bias starts at 0 under every rule, and no optimizer moves it (2408.15664)
        values = NOTHING if role.trained else base_values
        return RolePlan(values, NOTHING, {}, count, rule.why_not(role.name), "no answer", _init(role, None), role.start)
    of_scale = {"lr": scale, "weight_decay": 1 / scale}
    factor = Values(**{cell: getattr(row, cell)(ratio) * of_scale.get(cell, 1.0) for cell in FIELDS})
    values = Values(
        **{cell: None if value is None else value * getattr(factor, cell) for cell, value in base_values.items()}
    )
    formula = {
        cell: "?" if cell in row.unknown else _with_scale(cell, str(getattr(row, cell)), scale)
        for cell, value in values.items()
        if value is not None and role.trained
    }
    return RolePlan(
        values,
        factor,
        formula,
        count,
        source=f"{row.source}; {own_values}" if own_values else row.source,
        status=row.status,
        init=_init(role, row),
        constant=role.start,
        marks={cell: row.mark(cell) for cell in formula},
    )


def _with_scale(cell: str, text: str, scale: float) -> str:
    power = {"lr": "κ", "weight_decay": "κ^-1"}.get(cell) if scale != 1 else None
    return text if power is None else power if text == "1" else f"{text} · {power}"


def _init(role: Role, row: Row | None) -> str:
    if role.vector:
        return "constant"
    if not role.trained:
        return ZERO_INIT
    return NORMAL if row is None else row.init


def merge(blocks: tuple[BlockPlan, ...]) -> dict[str, RolePlan]:
    """Roles of the whole model, from the blocks that hold them.

    Args:
        blocks: of one plan, folded or not.

    Returns:
        role → its plan; a number in which the blocks that hold it differ is None there, and stands in each block.
    """
    if len(blocks) == 1:
        return dict(blocks[0].roles)
    merged = {}
    for role in blocks[0].roles:
        every = [block.roles[role] for block in blocks]
        # a role that no block holds stays in the list with count 0: JSON has every role
        holders = [planned for planned in every if planned.count] or every
        merged[role] = replace(
            holders[0],
            values=_agreed([planned.values for planned in holders]),
            factor=_agreed([planned.factor for planned in holders]),
        )
    return merged


def _agreed(many: list[Values]) -> Values:
    """The numbers in which all agree, None for the others."""
    found = {cell: {getattr(values, cell) for values in many} for cell in FIELDS}
    return Values(**{cell: alike.pop() if len(alike) == 1 else None for cell, alike in found.items()})


def carried_betas(
    betas: tuple[float, float], rule: Rule, transition: Transition, ratio: Mapping[str, float]
) -> tuple[float, float]:
    """1-β' = (1-β)·f or β' = β^f, which agrees to first order; f is the rule's, ρ_B/ρ_D = T*/T by the SDE rule.

    By the SDE rule Adam's averages last the same part of a run: (1-β)/η² is kept, as the SDE of Adam wants (2205.10287). By
    complete-mue's default f is 1: carried betas cost loss where runs get shorter, and gain nothing where they get longer
    (docs/findings/horizon.md).

    Args:
        betas: of the base. ratio: of any block; only batch and duration are read from it.

    Raises:
        ValueError: 1-β' leaves (0, 1); names the beta and the fewest steps (or the largest batch) that work.
    """
    factor = rule.one_minus_beta(ratio)
    if factor == 1:
        return betas
    if rule.betas == "power":
        return (betas[0] ** factor, betas[1] ** factor)
    i = 0 if betas[0] < betas[1] else 1  # the smaller beta leaves its domain first
    before, after = transition.base_training, transition.training
    # 1-β ≥ 1 would be no average at all. It is refused and not clamped: nobody tuned what a clamp gives.
    if (1 - betas[i]) * factor >= 1 and before is not None and after is not None:
        raise ValueError(
            f"beta{i + 1} = {betas[i]:g} cannot be carried from {before.steps:,} to {after.steps:,} steps:"
            f" (1-β) × {rule.one_minus_beta} = {(1 - betas[i]) * factor:g} is not below 1;"
            f" {_what_works(1 - betas[i], rule.one_minus_beta, before, after)}"
            + (', or betas = "power" or "unchanged"' if "betas" in rule.options else "")
        )
    return (1 - (1 - betas[0]) * factor, 1 - (1 - betas[1]) * factor)


def _what_works(one_minus_beta: float, factor: Monomial, before: Training, after: Training) -> str:
    """The fewest steps at the target's batch, or the largest batch, for which (1-β)·ρ_B^b·ρ_D^-m is below 1."""
    b, m = float(factor.exponent("ρ_B")), -float(factor.exponent("ρ_D"))
    if m == 0:
        # the number of steps is not in it: ρ_B < (1-β)^(-1/b)
        bound = one_minus_beta ** (-1 / b) * before.batch
        # Less than the bound is needed: where that is a whole number, rounding must not let it pass for enough.
        return f"at most {math.ceil(bound * (1 - 1e-12)) - 1:,} tokens a step work"
    # ρ_D = ρ_B·T/T*, so that (1-β)·ρ_B^(b-m)·(T/T*)^-m < 1; by the SDE rule b = m = 1, and the batch cancels
    octaves = math.log2(one_minus_beta * (after.batch / before.batch) ** (b - m)) / m
    if octaves > 40:  # a small m: the steps have next to no part in it, and the power would not fit into a float
        return "no run is long enough at this batch, a smaller batch works"
    return f"at least {math.floor(2**octaves * before.steps * (1 + 1e-12)) + 1:,} steps work"


def check_output_multiplier(target: Transformer, blocks: tuple[BlockPlan, ...]) -> None:
    """A target's own A is decided by the plan; ``ValueError`` if it declares another one."""
    declared = target.output_multiplier
    for block in blocks:
        # 1 is what a shape has where nobody says anything; another number that agrees with the plan contradicts nothing
        if declared != 1 and not math.isclose(declared, block.output_multiplier, rel_tol=1e-9):
            raise ValueError(
                f"target.output_multiplier = {declared:g}, but the plan decides it and gets {block.output_multiplier:g}: leave it out"
            )
