"""The base's value of every role: the tuned numbers, what replaces or multiplies them, and the base's own habits.

    [tuned.roles.embedding]
    lr = 3e-3                          # in place of the global lr
    [tuned.roles.ffn_down]
    lr_times = 4                       # of what it would be otherwise
    [tuned.roles.first_third.ffn_up]
    lr_times = 1.5                     # and once more in the first third of the layers, however many there are

A role of experts that has no value of its own follows the dense one (``Role.fallback``): ``ffn_down`` stands for routed and
shared experts too, as in the rule's table. A router has no counterpart on a dense base and follows the global values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from mue.plan.convention import Convention
from mue.plan.fold_table import fold_of
from mue.plan.plan import PlanData
from mue.plan.values import Values
from mue.rules.optimizers import of_tuned
from mue.rules.roles import ROLES
from mue.rules.table import ZERO_INIT, Rule
from mue.shapes import Block, HParams, Transformer
from mue.shapes.hparams import THIRDS, TIMES, third_and_role, third_of
from mue.util.errors import nearest
from mue.util.text import number


def check_roles(tuned: HParams, base: Transformer) -> None:
    """``ValueError`` for a per-role value of a role, of a thing, or in a third of the base, that does not exist."""
    known = [r for r in ROLES if ROLES[r].trained]
    for where, values in tuned.roles.items():
        third, role = third_and_role(where)
        if role not in known:
            raise ValueError(f"unknown role {role!r} in tuned.roles{nearest(role, known)}")
        if third and third not in THIRDS:
            raise ValueError(f"unknown third {third!r} in tuned.roles{nearest(third, THIRDS)}")
        if third and not ROLES[role].inside:
            raise ValueError(f"tuned.roles.{where}: {role} lies outside the blocks and has no depth; leave {third} out")
        for name in values:
            if ROLES[role].vector and name.removesuffix(TIMES) in ("init_std", "weight_decay"):
                raise ValueError(
                    f"tuned.roles.{where}.{name}: gains start at 1 and biases at 0, and neither is decayed; leave it out"
                )
            if name == "init_std" and values[name] == 0 and fold_of(tuned.optimizer).lr == 0:
                raise ValueError(
                    f"tuned.roles.{where}.init_std = 0: {tuned.optimizer} moves a weight in proportion to its size, so it would stay 0"
                )
            if name == f"weight_decay{TIMES}" and overrides(tuned, role, "weight_decay", third)[0][1] == 0:
                raise ValueError(f"tuned.roles.{where}.{name} multiplies a weight decay of 0; leave it out")
    for third in sorted(thirds_in(tuned) - {third_of(i, base.layers) for i in range(base.layers)}):
        raise ValueError(
            f"tuned.roles.{third}: the base has {base.layers} layers, none of them in its {third.replace('_', ' ')}"
        )


def overrides(tuned: HParams, role: str, field: str, third: str) -> list[tuple[str, float]]:
    """How a role's number comes about: the value it starts from, then what multiplies it, each with its name.

    The most specific table first: what it gives replaces, or multiplies, what the next would say.

    Args:
        role: by name. field: of :data:`mue.rules.table.FIELDS`. third: of the depth, or ``""`` for all of it.

    Returns:
        (where it is written, the number) of the value, then of each multiplier, the most general first.
    """
    names = ROLES[role].tuned_as
    times: list[tuple[str, float]] = []
    for where in [f"{third}.{n}" for n in names if third] + list(names):
        table = tuned.roles.get(where, {})
        if field in table:
            return [(f"tuned.roles.{where}.{field}", table[field]), *reversed(times)]
        if field + TIMES in table:
            times.append((f"tuned.roles.{where}.{field}{TIMES}", table[field + TIMES]))
    beside = f"adamw_{field}"  # of what AdamW moves beside Muon, where it was tuned apart
    if tuned.optimizer == "muon" and of_tuned(tuned, role) == "adamw" and getattr(tuned, beside, None) is not None:
        return [(f"tuned.{beside}", getattr(tuned, beside)), *reversed(times)]
    return [(f"tuned.{field}", getattr(tuned, field)), *reversed(times)]


def base_values(role: str, base: Transformer, tuned: HParams, convention: Convention, third: str = "") -> Values:
    """A role's tuned values on the base, with the base's own habits applied.

    Args:
        role: by name. base: the tuned shape. third: of the depth, where that has values of its own, or ``""``.

    Returns:
        Absolute values, weight decay in torch's decoupled form. No init std for vectors, and nothing but a start at 0
        for what the optimizer does not move.
    """
    if not ROLES[role].trained:
        return Values(0.0, None, None, None)

    def own(field: str) -> float:
        return math.prod(value for _, value in overrides(tuned, role, field, third))

    lr, wd, std = own("lr"), own("weight_decay"), own("init_std")
    if convention.weight_decay == "independent":
        wd = wd / lr  # torch multiplies by lr: the role's own, as its group has it
    if convention.depth_scaled_init and ROLES[role].writes_residual:
        # 1/√(2L*) with the base's depth, for it is part of what was tuned; from there the rule's depth takes over
        std /= math.sqrt(2 * base.layers)
    if ROLES[role].vector:
        return Values(None, lr, 0.0, own("eps"))
    return Values(std, lr, wd, own("eps"))


# ---- depth -----------------------------------------------------------------------------------------------------------


def thirds_in(tuned: HParams) -> set[str]:
    """The thirds that have values of their own."""
    return {third for third, _ in map(third_and_role, tuned.roles) if third}


def split_by_third(shape: Transformer, tuned: HParams) -> Iterator[tuple[Block, str]]:
    """A shape's blocks, cut where a third with values of its own begins or ends: (block, third, or "" for none)."""
    own, first = thirds_in(tuned), 0
    for block in shape.blocks:
        thirds = (third_of(i, shape.layers) for i in range(first, first + block.layers))
        for third, layers in groupby(t if t in own else "" for t in thirds):
            yield _part(block, len(list(layers)), shape), third
        first += block.layers


def _part(block: Block, layers: int, shape: Transformer) -> Block:
    """So many layers of a block, with the pools that they read."""
    if layers % block.readers:
        raise ValueError(
            f"{shape.name}: {block.readers} layers read each pool of experts, and tuned.roles has values for a third of the depth,"
            f" which ends within one: leave the thirds out, or use pools of layers that lie in one third"
        )
    return replace(block, layers=layers, pools=layers // block.readers if block.pools else 0)


def planned_values(plan: PlanData, role: str, third: str) -> Values:
    """A base plan's values of a role in one third; ``ValueError`` where it has no layer there to say them."""
    own, layers = thirds_in(plan.tuned), plan.target.layers
    if not own:
        return plan.roles[role].values
    for layer in range(layers):
        here = third_of(layer, layers)
        if (here if here in own else "") == third:
            return plan.role(role, layer).values
    raise ValueError(f"the base plan has {layers} layers, all of them in thirds with values of their own: give it 3")


# ---- for readers -----------------------------------------------------------------------------------------------------


def describe(tuned: HParams, role: str, third: str = "") -> str:
    """``"tuned.roles.ffn_down: lr × 4"`` for a role that has values of its own, or ``""``."""
    names = ROLES[role].tuned_as[::-1]
    found = [*names, *(f"{third}.{n}" for n in names if third)]
    return "; ".join(f"tuned.roles.{where}: {_table(tuned.roles[where])}" for where in found if where in tuned.roles)


def summary(tuned: HParams) -> str:
    """Every per-role value in one line."""
    return "; ".join(f"{where.replace('.', ' ')} {_table(values)}" for where, values in tuned.roles.items())


def _table(values: dict[str, float]) -> str:
    return ", ".join(
        f"{k.removesuffix(TIMES).replace('_', ' ')} {'×' if k.endswith(TIMES) else '='} {number(v)}"
        for k, v in values.items()
    )


def notes(tuned: HParams, rule: Rule, base: Transformer, target: Transformer) -> list[str]:
    """What per-role values do not reach, or reach beyond their name."""
    if not tuned.roles:
        return []
    counts, found = target.counts(), []
    followed: dict[str, list[str]] = {}
    for where, values in tuned.roles.items():
        third, name = third_and_role(where)
        reached = [r for r in ROLES if counts.get(r) and name in ROLES[r].tuned_as]
        if not reached:
            found.append(f"tuned.roles.{where}: the target has no {name}, so it is used by nothing")
        elif third and third not in {third_of(i, target.layers) for i in range(target.layers)}:
            found.append(f"tuned.roles.{where}: none of the target's {target.layers} layers lies there")
        for role in reached:
            if role != name:
                followed.setdefault(name, []).append(role)
            row = rule.rows.get(role)
            if row is not None and row.init == ZERO_INIT and any(k.startswith("init_std") for k in values):
                found.append(
                    f"tuned.roles.{where}: {rule.name} starts {role} at zero, so its init std is used by nothing"
                )
    found += [
        f"tuned.roles.{name} stands for {', '.join(dict.fromkeys(roles))} too" for name, roles in followed.items()
    ]
    if counts.get("router") and not base.counts().get("router") and "router" not in tuned.roles:
        found.append("router: the base has none, so no per-role value stands for it; it follows the global ones")
    return found
