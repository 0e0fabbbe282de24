"""Folding on a model: the coefficient of every parameter, and a run carried from one form to the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mue.apply import matched
from mue.fold.plan import state_powers, unfold
from mue.plan import Plan
from mue.roles import HasLayout, Placed, unwrap, weights_beside


class Folded(NamedTuple):
    """One tensor's c: what the plan's values for its role have in them, and what this tensor has beyond that."""

    placed: Placed
    planned: float
    own: float = 1.0

    @property
    def c(self) -> float:
        return self.planned * self.own


def coefficients(plan: Plan, model: nn.Module) -> dict[Tensor, float]:
    """Parameter → its c in a folded plan; 1 where nothing is folded into it (and everywhere in a plan that is not folded).

    A bias has the c of the weight beside it: ``x.bias`` that of ``x.weight``, ``down_bias`` that of ``down``. A norm that ends
    a residual branch has the residual multiplier, in place of the projection before it. On a stock model the queries (or
    their norm's gain) have what brings the model's own attention scale to the planned one.

    Raises:
        ValueError: a model that is not the planned one, or a bias whose weight cannot be told.
    """
    return {f.placed.parameter: f.c for f in folded_model(plan, model)}


def folded_model(plan: Plan, model: nn.Module) -> list[Folded]:
    """Every parameter of a planned model with its c; see :func:`coefficients`."""
    from mue.layouts.stock import query_coefficients

    placed = matched(plan, model)
    queries = {} if isinstance(unwrap(model), HasLayout) else query_coefficients(plan, model, placed)
    return folded_parameters(plan, placed, queries)


def folded_parameters(plan: Plan, placed: Sequence[Placed], queries: Mapping[str, float]) -> list[Folded]:
    """:func:`folded_model` for parameters that already have their roles; ``queries``: name → what the query carries."""
    branch = unfold(plan).residual_multiplier if plan.folding is not None else 1.0
    ended = {pattern for p in placed for pattern in p.layout.after}
    weights = {}
    for p in placed:
        if p.role != "bias":
            moved = 1 / branch if p.layout.pattern in ended else branch if p.layout.after else 1.0
            weights[p.name] = Folded(p, _planned(plan, p), moved * queries.get(p.name, 1.0))
    folds = plan.folding is not None or bool(queries)
    return [weights[p.name] if p.role != "bias" else _of_bias(p, weights, folds) for p in placed]


def _planned(plan: Plan, p: Placed) -> float:
    if plan.folding is None:
        return 1.0
    seen = 0
    for block, c in zip(plan.blocks, plan.folding.coefficients, strict=True):
        seen += block.layers
        if p.layer is None or p.layer < seen:
            return c.get(p.role, 1.0)
    raise AssertionError(f"{p.name} is in layer {p.layer} of {seen}")


def _of_bias(bias: Placed, weights: Mapping[str, Folded], folds: bool) -> Folded:
    """A bias is scaled with the weight it is added to."""
    for name in weights_beside(bias.name):
        if name in weights:
            return Folded(bias, 1.0, weights[name].c)
    if folds:
        raise ValueError(
            f"{bias.name} is a bias, but no weight {weights_beside(bias.name)[0]} stands beside it, so its fold cannot be told:"
            " name it like its weight, or drop the bias"
        )
    return Folded(bias, 1.0)


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
    here = {f.placed.name: f for f in folded_model(source_plan, source)}
    states = _by_parameter(source_optimizer)
    goals = _by_parameter(target_optimizer)
    with torch.no_grad():
        for f in folded_model(target_plan, target):
            p = f.placed
            if p.name not in here:
                raise ValueError(f"{p.name} is in the target model only: both must name their parameters alike")
            q, ratio = here[p.name].placed.parameter, f.c / here[p.name].c
            offset = p.gain_offset or (gain_offset if p.role == "final_norm" else 0.0)
            p.parameter.copy_(scaled(q, ratio, offset))
            if states and goals:
                powers = state_powers(target_plan, p.role)
                _carry(p.name, q, states, p.parameter, goals, ratio, powers)


def scaled(weight: Tensor, ratio: float, offset: float = 0.0) -> Tensor:
    """A weight in another form, rounded once; ``offset`` is 1 for a gain that the code adds one to."""
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
) -> None:
    for side, table in ((source, states), (target, goals)):
        if side not in table:
            raise ValueError(f"{name} is in no optimizer of the {'source' if side is source else 'target'}")
    old, old_group = states[source]
    new, new_group = goals[target]
    if old_group.get("initial_lr"):  # the schedule's phase
        new_group["lr"] = new_group.get("initial_lr", new_group["lr"]) * old_group["lr"] / old_group["initial_lr"]
    new.state[target] = {k: converted(name, k, v, ratio, powers) for k, v in old.state.get(source, {}).items()}


def converted(name: str, key: str, value: Any, ratio: float, powers: Mapping[str, int]) -> Any:
    """One entry of a parameter's optimizer state where its c changes by ``ratio``; ``ValueError`` for an unknown one."""
    if not isinstance(value, Tensor) or key == "step":
        return value.clone() if isinstance(value, Tensor) else value
    if key not in powers:
        raise ValueError(
            f"{name}: optimizer state {key!r} is not in mue.fold.FOLDS ({', '.join(powers)}), so its power of c is not known"
        )
    return value * ratio ** powers[key] if ratio != 1 else value.clone()
