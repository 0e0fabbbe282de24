"""Folding on a model: the coefficient of every parameter, and a run carried from one form to the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mue.apply import matched
from mue.fold.plan import state_powers
from mue.plan import Plan
from mue.roles import Placed


def coefficients(plan: Plan, model: nn.Module) -> dict[Tensor, float]:
    """Parameter → its c in a folded plan; 1 where nothing is folded into it (and everywhere in a plan that is not folded).

    A bias has the c of the weight beside it: ``x.bias`` that of ``x.weight``, ``down_bias`` that of ``down``.

    Raises:
        ValueError: a model that is not the planned one, or a bias whose weight cannot be told.
    """
    return {p.parameter: c for p, c in placed_coefficients(plan, matched(plan, model))}


def placed_coefficients(plan: Plan, placed: Sequence[Placed]) -> list[tuple[Placed, float]]:
    """:func:`coefficients` for parameters that already have their roles."""
    if plan.folding is None:
        return [(p, 1.0) for p in placed]
    by_name = {p.name: p for p in placed}
    return [(p, _coefficient(plan, _weight_of(p, by_name) if p.role == "bias" else p)) for p in placed]


def _coefficient(plan: Plan, p: Placed | None) -> float:
    if p is None:
        return 1.0
    assert plan.folding is not None
    seen = 0
    for block, c in zip(plan.blocks, plan.folding.coefficients, strict=True):
        seen += block.layers
        if p.layer is None or p.layer < seen:
            return c.get(p.role, 1.0)
    raise AssertionError(f"{p.name} is in layer {p.layer} of {seen}")


def _weight_of(bias: Placed, by_name: Mapping[str, Placed]) -> Placed | None:
    """The weight a bias is added to; None for one outside any weight (its own parameter of a norm)."""
    stem = bias.name.removesuffix("bias")
    for name in (f"{stem}weight", stem.rstrip("._"), f"{stem.rstrip('._')}.weight"):
        if name != bias.name and name in by_name:
            weight = by_name[name]
            return None if weight.role in ("norm", "qk_norm") else weight
    raise ValueError(
        f"{bias.name} is a bias, but no weight {stem}weight stands beside it, so its fold cannot be told:"
        " name it like its weight, or drop the bias"
    )


def convert(
    source: nn.Module,
    source_plan: Plan,
    target: nn.Module,
    target_plan: Plan,
    source_optimizer: Optimizer | Iterable[Optimizer] = (),
    target_optimizer: Optimizer | Iterable[Optimizer] = (),
    *,
    gain_offset: float = 0.0,
) -> None:
    """Carry weights and optimizer state from one form of a plan to another, at any moment of a run, in place in ``target``.

    The two plans are foldings of one plan (multipliers, R in the weights, R in the model); each model has its own plan's
    forward multipliers, each optimizer its own plan's ``param_groups``. Learning rates keep the phase of the schedule.

    Args:
        gain_offset: 1 for models whose final norm multiplies by ``1 + w`` (Gemma's).

    Raises:
        ValueError: plans of different inputs, models that are not the planned ones, or a state tensor whose power of c is
            not known.
    """
    if source_plan.inputs.to_dict() != target_plan.inputs.to_dict():
        raise ValueError(
            f"plans {source_plan.hash} and {target_plan.hash} are not two forms of one plan: convert only what fold or unfold gave"
        )
    here = {p.name: (p, c) for p, c in placed_coefficients(source_plan, matched(source_plan, source))}
    states = _by_parameter(source_optimizer)
    goals = _by_parameter(target_optimizer)
    with torch.no_grad():
        for p, c in placed_coefficients(target_plan, matched(target_plan, target)):
            if p.name not in here:
                raise ValueError(f"{p.name} is in the target model only: both must name their parameters alike")
            q, c0 = here[p.name]
            ratio, offset = c / c0, gain_offset if p.role == "final_norm" else 0.0
            p.parameter.copy_((q.parameter + offset) * ratio - offset if ratio != 1 else q.parameter)
            if states and goals:
                powers = state_powers(target_plan, p.role)
                _carry(p.name, q.parameter, states, p.parameter, goals, ratio, powers)


def _by_parameter(optimizers: Optimizer | Iterable[Optimizer]) -> dict[Tensor, tuple[Optimizer, dict[str, Any]]]:
    """Parameter → its optimizer and group."""
    many = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    return {p: (o, group) for o in many for group in o.param_groups for p in group["params"]}


def _carry(
    name: str,
    source: Tensor,
    states: Mapping[Tensor, tuple[Optimizer, dict[str, Any]]],
    target: Tensor,
    goals: Mapping[Tensor, tuple[Optimizer, dict[str, Any]]],
    ratio: float,
    powers: Mapping[str, int],
) -> None:
    for side, table in ((source, states), (target, goals)):
        if side not in table:
            raise ValueError(f"{name} is in no optimizer of the {'source' if side is source else 'target'}")
    old, old_group = states[source]
    new, new_group = goals[target]
    if old_group.get("initial_lr"):  # the schedule's phase
        new_group["lr"] = new_group.get("initial_lr", new_group["lr"]) * old_group["lr"] / old_group["initial_lr"]
    new.state[target] = {k: _converted(name, k, v, ratio, powers) for k, v in old.state.get(source, {}).items()}


def _converted(name: str, key: str, value: Any, ratio: float, powers: Mapping[str, int]) -> Any:
    if not isinstance(value, Tensor) or key == "step":
        return value.clone() if isinstance(value, Tensor) else value
    if key not in powers:
        raise ValueError(
            f"{name}: optimizer state {key!r} is not in mue.fold.FOLDS ({', '.join(powers)}), so its power of c is not known"
        )
    return value * ratio ** powers[key] if ratio != 1 else value.clone()
