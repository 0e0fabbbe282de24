"""A run in memory carried from one form of its plan to the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mue.model.apply import param_groups
from mue.model.coefficients import tensor_folds
from mue.plan.fold import state_powers
from mue.plan.plan import PlanData


def convert(
    source: nn.Module,
    source_plan: PlanData,
    target: nn.Module,
    target_plan: PlanData,
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
    here = {f.info.name: f for f in tensor_folds(source_plan, source)}
    states = _by_parameter(source_optimizer)
    goals = _by_parameter(target_optimizer)
    before, after = _rates(source_plan, source), _rates(target_plan, target)
    with torch.no_grad():
        for f in tensor_folds(target_plan, target):
            p = f.info
            if p.name not in here:
                raise ValueError(f"{p.name} is in the target model only: both must name their parameters alike")
            q, ratio = here[p.name].info.parameter, f.c / here[p.name].c
            offset = p.gain_offset or (gain_offset if p.role == "final_norm" else 0.0)
            p.parameter.copy_(rescale_weight(q, ratio, offset))
            if states and goals and p.parameter in after:  # a balance bias is in no optimizer
                powers = state_powers(target_plan, p.role)
                rates = before[q], after[p.parameter]
                _carry(p.name, q, states, p.parameter, goals, ratio, powers, rates)


def _rates(plan: PlanData, model: nn.Module) -> dict[Tensor, float]:
    """Parameter → its planned peak."""
    return {p: float(group["lr"]) for group in param_groups(plan, model) for p in group["params"]}


def rescale_weight(weight: Tensor, ratio: float, offset: float = 0.0) -> Tensor:
    """A weight in another form, rounded once; ``offset`` is 1 for a gain that the code adds one to."""
    # float64 in between: (w + 1)·c - 1 of a small w would lose digits in float32
    return ((weight.double() + offset) * ratio - offset).to(weight.dtype) if ratio != 1 else weight


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
    rates: tuple[float, float],
) -> None:
    """One parameter's optimizer state and rate into the other form; ``ratio`` is c there over c here, ``rates`` its peaks."""
    for side, table in ((source, states), (target, goals)):
        if side not in table:
            raise ValueError(f"{name} is in no optimizer of the {'source' if side is source else 'target'}")
    old, old_group = states[source]
    new, new_group = goals[target]
    # By the planned peaks, for what a group has beside its rate is its scheduler's own: OneCycleLR's initial_lr is where it starts.
    new_group["lr"] = rates[1] * old_group["lr"] / rates[0]
    if "initial_lr" in old_group:
        new_group.setdefault("initial_lr", rates[1])
    new.state[target] = {k: rescale_state(name, k, v, ratio, powers) for k, v in old.state.get(source, {}).items()}


def rescale_state(name: str, key: str, value: Any, ratio: float, powers: Mapping[str, int]) -> Any:
    """One entry of a parameter's optimizer state where its c changes by ``ratio``; ``ValueError`` for an unknown one."""
    if not isinstance(value, Tensor) or key == "step":
        return value.clone() if isinstance(value, Tensor) else value
    if key not in powers:
        raise ValueError(
            f"{name}: optimizer state {key!r} is not in mue.fold.FOLDS ({', '.join(powers)}), so its power of c is not known"
        )
    return value * ratio ** powers[key] if ratio != 1 else value.clone()
