"""Folding on a model: the coefficient of every parameter, and a run carried from one form to the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from mue.layouts.layout import HasLayout, ParamInfo, unwrap, weights_beside
from mue.model.match import match_model
from mue.plan.fold import unfold
from mue.plan.plan import PlanData


class TensorFold(NamedTuple):
    """One tensor's c: what the plan's values for its role have in them, and what this tensor has beyond that."""

    placed: ParamInfo
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
    return {f.placed.parameter: f.c for f in tensor_folds(plan, model)}


def tensor_folds(plan: PlanData, model: nn.Module) -> list[TensorFold]:
    """Every parameter of a planned model with its c; see :func:`coefficients`."""
    from mue.model.stock import query_coefficients

    placed = match_model(plan, model)
    queries = {} if isinstance(unwrap(model), HasLayout) else query_coefficients(plan, model, placed)
    return tensor_folds_of(plan, placed, queries)


def tensor_folds_of(plan: PlanData, placed: Sequence[ParamInfo], queries: Mapping[str, float]) -> list[TensorFold]:
    """:func:`tensor_folds` for parameters that already have their roles; ``queries``: name → what the query carries."""
    branch = 1.0 if plan.folding is None else unfold(plan).residual_multiplier
    ended = {pattern for p in placed for pattern in p.layout.after}
    weights = {}
    for p in placed:
        if p.role != "bias":
            moved = 1 / branch if p.layout.pattern in ended else branch if p.layout.after else 1.0
            weights[p.name] = TensorFold(p, _planned(plan, p), moved * queries.get(p.name, 1.0))
    folds = plan.folding is not None or bool(queries)
    return [weights[p.name] if p.role != "bias" else _of_bias(p, weights, folds) for p in placed]


def _planned(plan: PlanData, p: ParamInfo) -> float:
    if plan.folding is None:
        return 1.0
    index = 0 if p.layer is None else plan.block_of(p.layer)  # outside the blocks, every block says the same
    return plan.folding.coefficients[index].get(p.role, 1.0)


def _of_bias(bias: ParamInfo, weights: Mapping[str, TensorFold], folds: bool) -> TensorFold:
    """A bias is scaled with the weight it is added to."""
    for name in weights_beside(bias.name):
        if name in weights:
            return TensorFold(bias, 1.0, weights[name].c)
    if folds:
        raise ValueError(
            f"{bias.name} is a bias, but no weight {weights_beside(bias.name)[0]} stands beside it, so its fold cannot be told:"
            " name it like its weight, or drop the bias"
        )
    return TensorFold(bias, 1.0)
