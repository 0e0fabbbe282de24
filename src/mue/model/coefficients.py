"""The coefficient c of every parameter in a folded plan: a weight that was used as ``c·W`` is stored as ``W' = c·W``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from mue.layouts.layout import HasLayout, ParamInfo, unwrap, weights_beside
from mue.model.match import match_model
from mue.plan.fold import unfold
from mue.plan.plan import PlanData


class TensorFold(NamedTuple):
    """One tensor's c, in two factors.

    Attributes:
        info: the parameter with its role. of_role: the factor that the folded plan's values for its role have in them.
        own: what this tensor has beyond that, so that its values are not the role's (a bias beside a folded weight, a norm
            that ends a branch, a query that carries the attention scale).
    """

    info: ParamInfo
    of_role: float
    own: float = 1.0

    @property
    def c(self) -> float:
        return self.of_role * self.own


def coefficients(plan: PlanData, model: nn.Module) -> dict[Tensor, float]:
    """What is folded into each parameter of a model, as clipping and conversions need it.

    A bias has the c of the weight beside it: ``x.bias`` that of ``x.weight``, ``down_bias`` that of ``down``. A norm that ends
    a residual branch has the residual multiplier, in place of the projection before it. On a stock model the queries (or
    their norm's gain) have what brings the model's own attention scale to the planned one.

    Args:
        plan: folded or not. model: the planned one.

    Returns:
        Parameter → its c; 1 where nothing is folded into it, and everywhere in a plan that is not folded.

    Raises:
        ValueError: a model that is not the planned one, or a bias whose weight cannot be told.
    """
    return {fold.info.parameter: fold.c for fold in tensor_folds(plan, model)}


def tensor_folds(plan: PlanData, model: nn.Module) -> list[TensorFold]:
    """Every parameter of a planned model with its c, in the model's order; see :func:`coefficients`.

    Args:
        plan: folded or not. model: the planned one.

    Raises:
        ValueError: as :func:`coefficients`.
    """
    params = match_model(plan, model)
    queries: Mapping[str, float] = {}
    if not isinstance(unwrap(model), HasLayout):  # one that declares itself takes the planned attention scale
        from mue.model.stock import query_coefficients  # on use: what observes stock models takes a moment to import

        queries = query_coefficients(plan, model, params)
    return tensor_folds_of(plan, params, queries)


def tensor_folds_of(plan: PlanData, params: Sequence[ParamInfo], queries: Mapping[str, float]) -> list[TensorFold]:
    """:func:`tensor_folds` for parameters that already have their roles.

    Args:
        queries: by name, what is folded into queries or the gain of their norm for the sake of the attention scale.

    Raises:
        ValueError: a bias whose weight cannot be told.
    """
    residual = 1.0 if plan.folding is None else unfold(plan).residual_multiplier
    ended_by_norm = {pattern for p in params for pattern in p.layout.after}
    weights: dict[str, TensorFold] = {}
    for p in params:
        if p.role != "bias":
            # A norm at the end of a branch cancels what is folded before it: its gain takes l^-α, the projection gives it back.
            moved = 1 / residual if p.layout.pattern in ended_by_norm else residual if p.layout.after else 1.0
            weights[p.name] = TensorFold(p, _of_role(plan, p), moved * queries.get(p.name, 1.0))
    folds = plan.folding is not None or bool(queries)
    return [weights[p.name] if p.role != "bias" else _of_bias(p, weights, folds) for p in params]


def _of_role(plan: PlanData, p: ParamInfo) -> float:
    if plan.folding is None:
        return 1.0
    index = 0 if p.layer is None else plan.block_of(p.layer)  # outside the blocks, every block says the same
    return plan.folding.coefficients[index].get(p.role, 1.0)


def _of_bias(bias: ParamInfo, weights: Mapping[str, TensorFold], folds: bool) -> TensorFold:
    """A bias is scaled with the weight it is added to. ``folds``: something is folded, so that its weight must be known."""
    for name in weights_beside(bias.name):
        if name in weights:
            return TensorFold(bias, 1.0, weights[name].c)
    if folds:
        raise ValueError(
            f"{bias.name} is a bias, but no weight {weights_beside(bias.name)[0]} stands beside it, so its fold cannot be told:"
            " name it like its weight, or drop the bias"
            if bias.name.endswith("bias")
            else f"{bias.name} has the role bias, but is not named like one, so that its weight and its fold cannot be told: a gain has"
            " the role norm; a bias is named like its weight (up.bias beside up.weight, up_bias beside up)"
        )
    return TensorFold(bias, 1.0)
