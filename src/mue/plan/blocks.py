"""From a rule's table and two shapes to values per role: the arithmetic behind :func:`mue.plan.transfer.transfer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mue.plan.ratios import base_block, ratios
from mue.plan.values import NOTHING, BlockPlan, RolePlan, Values
from mue.rules.roles import ROLES
from mue.rules.table import FIELDS, ZERO_INIT, Row, Rule
from mue.shapes import Block, Training, Transformer


@dataclass(frozen=True)
class Change:
    """One transfer without its tuned values: from which shape and run to which."""

    base: Transformer
    target: Transformer
    base_training: Training | None
    training: Training | None

    def ratios(self, block: Block, kind: str = "") -> dict[str, float]:
        return ratios(self.base, self.target, block, self.base_training, self.training, kind)


def block_plan(
    rule: Rule,
    change: Change,
    block: Block,
    base_output: float,
    star: Callable[[str], Values],
    said: Callable[[str], str],
) -> BlockPlan:
    """One block's plan; ``star`` gives the base's values of a role, ``said`` its own in words, ``base_output`` is A*."""
    counts = change.target.counts()
    here = {kind: change.ratios(block, kind) for kind in ("", "shared")}
    roles = {
        role: _role_plan(
            role,
            rule,
            star(role),
            here["shared" if ROLES[role].kind == "shared" else ""],
            counts.get(role, 0) if ROLES[role].present(block) else 0,
            said(role),
        )
        for role in ROLES
    }
    common = here[""]
    # σ0 moves with 1/√(tokens seen): all of them, or a routed expert's share of them (conventions 6).
    share = block.share / base_block(change.base).share
    drift = {
        "sigma0_experts": (common["ρ_D"] * share) ** -0.5,
        "sigma0_other": common["ρ_D"] ** -0.5,
        "up_gate": None if rule.up_gate is None else rule.up_gate(common),
    }
    A = base_output * rule.output_multiplier(common)
    R = block.route_scale if rule.routed else 1.0
    return BlockPlan(block.layers, block.notation, block.active_width, A, R, drift, roles)


def _role_plan(role: str, rule: Rule, star: Values, ratio: Mapping[str, float], count: int, said: str) -> RolePlan:
    if role not in rule.rows:
        values = star if not ROLES[role].trained else NOTHING
        return RolePlan(
            values, NOTHING, {}, count, rule.why_not(role), "no answer", _init(role, None), ROLES[role].start
        )
    row = rule.rows[role]
    factor = _factors(row, ratio)
    values = Values(
        *(
            None if v is None or f is None else v * f
            for (_, v), (_, f) in zip(star.items(), factor.items(), strict=True)
        )
    )
    formula = {
        name: "?" if name in row.unknown else str(getattr(row, name))
        for name, value in values.items()
        if value is not None and ROLES[role].trained
    }
    marks = {name: row.mark(name) for name in formula}
    source = f"{row.source}; {said}" if said else row.source
    return RolePlan(values, factor, formula, count, source, row.status, _init(role, row), ROLES[role].start, marks)


def _init(role: str, row: Row | None) -> str:
    if ROLES[role].vector:
        return "constant"
    return ZERO_INIT if not ROLES[role].trained else "normal" if row is None else row.init


def _factors(row: Row, ratio: Mapping[str, float]) -> Values:
    return Values(row.init_std(ratio), row.lr(ratio), row.weight_decay(ratio), row.eps(ratio))


def merge(blocks: tuple[BlockPlan, ...]) -> dict[str, RolePlan]:
    """Roles of the whole model: from the blocks that hold them; a value in which those differ becomes None."""
    if len(blocks) == 1:
        return dict(blocks[0].roles)
    merged = {}
    for role in ROLES:
        holders = [b.roles[role] for b in blocks if b.roles[role].count] or [b.roles[role] for b in blocks]
        first = holders[0]

        def same(of: str, holders: list[RolePlan] = holders) -> Values:
            found = [{getattr(getattr(h, of), name) for h in holders} for name in FIELDS]
            return Values(*(f.pop() if len(f) == 1 else None for f in found))

        merged[role] = replace(first, values=same("values"), factor=same("factor"))
    return merged


def carried_betas(
    betas: tuple[float, float], rule: Rule, change: Change, ratio: Mapping[str, float]
) -> tuple[float, float]:
    """1-β' = (1-β)·ρ_B/ρ_D = (1-β)·T*/T, or β' = β^(ρ_B/ρ_D); the domain error names the beta and the fewest steps."""
    factor = rule.one_minus_beta(ratio)
    if factor == 1:
        return betas
    if rule.betas == "power":
        return (betas[0] ** factor, betas[1] ** factor)
    i = 0 if betas[0] < betas[1] else 1  # the smaller beta leaves its domain first
    if (1 - betas[i]) * factor >= 1 and change.base_training is not None and change.training is not None:
        # (1-β)·ρ_B^(1-2q)·(T/T*)^-2q < 1, which for q = 1/2 is (1-β)·T*/T < 1: the batch cancels.
        q = -rule.one_minus_beta.exponent("ρ_D") / 2
        bound = ((1 - betas[i]) * ratio["ρ_B"] ** float(1 - 2 * q)) ** float(1 / (2 * q))
        needed = math.floor(bound * change.base_training.steps * (1 + 1e-12)) + 1
        raise ValueError(
            f"beta{i + 1} = {betas[i]:g} cannot be carried from {change.base_training.steps:,} to"
            f" {change.training.steps:,} steps: (1-β)·T*/T = {(1 - betas[i]) * factor:g} is not below 1; at least"
            f" {needed:,} steps work" + (', or betas = "power"' if "betas" in rule.options else "")
        )
    return (1 - (1 - betas[0]) * factor, 1 - (1 - betas[1]) * factor)


def check_output_multiplier(target: Transformer, blocks: tuple[BlockPlan, ...]) -> None:
    """A target's own A is decided by the plan; ``ValueError`` if it declares another one."""
    declared = target.output_multiplier
    for block in blocks:
        if declared != 1 and not math.isclose(declared, block.output_multiplier, rel_tol=1e-9):
            raise ValueError(
                f"target.output_multiplier = {declared:g}, but the plan decides it and gets {block.output_multiplier:g}: leave it out"
            )
