"""Folding on a model: the coefficient of every parameter, and a run carried from one form to the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from mue.layouts.layout import HasLayout, Placed, unwrap, weights_beside
from mue.model.match import matched
from mue.plan.fold import unfold
from mue.plan.plan import PlanData


class Folded(NamedTuple):
    """One tensor's c: what the plan's values for its role have in them, and what this tensor has beyond that."""

    placed: Placed
    planned: float
    own: float = 1.0

    @property
    def c(self) -> float:
        return self.planned * self.own


def coefficients(plan: PlanData, model: nn.Module) -> dict[Tensor, float]:
    """Parameter → its c in a folded plan; 1 where nothing is folded into it (and everywhere in a plan that is not folded).

    A bias has the c of the weight beside it: ``x.bias`` that of ``x.weight``, ``down_bias`` that of ``down``. A norm that ends
    a residual branch has the residual multiplier, in place of the projection before it. On a stock model the queries (or
    their norm's gain) have what brings the model's own attention scale to the planned one.

    Raises:
        ValueError: a model that is not the planned one, or a bias whose weight cannot be told.
    """
    return {f.placed.parameter: f.c for f in folded_model(plan, model)}


def folded_model(plan: PlanData, model: nn.Module) -> list[Folded]:
    """Every parameter of a planned model with its c; see :func:`coefficients`."""
    from mue.model.stock import query_coefficients

    placed = matched(plan, model)
    queries = {} if isinstance(unwrap(model), HasLayout) else query_coefficients(plan, model, placed)
    return folded_parameters(plan, placed, queries)


def folded_parameters(plan: PlanData, placed: Sequence[Placed], queries: Mapping[str, float]) -> list[Folded]:
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


def _planned(plan: PlanData, p: Placed) -> float:
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
