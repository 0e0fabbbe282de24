"""What a plan means on a stock model, whose forward code stays as it is: what it refuses, and what its queries must carry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from mue.layouts.layout import ParamInfo, unwrap
from mue.layouts.observe.config import integers, text_config
from mue.layouts.observe.describe import Description
from mue.layouts.transformers.family import family_of
from mue.layouts.transformers.scalings import scalings
from mue.layouts.transformers.shape import Routers
from mue.layouts.transformers.stock import is_stock, observe_stock
from mue.plan.fold import unfold
from mue.plan.plan import PlanData
from mue.shapes import MEASURED
from mue.util.text import number


def stock_faults(plan: PlanData, model: nn.Module) -> list[str]:
    """Why a plan cannot be applied to a stock model as it stands, each with the way out.

    Args:
        plan: in the form in which it would be applied.
        model: any; one that is not from ``transformers`` has no such faults.

    Returns:
        Messages, none where the plan can be applied.
    """
    if not is_stock(model):
        return []
    config, known = unwrap(model).config, observe_stock(model)
    faults = [
        f"{s.attribute} = {s.value:g} already scales the {s.what}, and the plan would scale it twice: set {s.attribute} = {s.neutral:g}"
        for s in scalings(config)
        if s.active
    ]
    faults += _gate_faults(plan, known.routing)
    multipliers = plan.multipliers
    if multipliers.residual != 1 or multipliers.head != 1 or any(a != 1 for a in multipliers.output):
        return [*faults, "a stock model has no forward multipliers: use mue.fold.fold(plan)"]
    return faults + _route_faults(multipliers.route, known.routing) + _norm_faults(plan, known.description)


def _gate_faults(plan: PlanData, routing: Routers | None) -> list[str]:
    """The model's routers must choose as many experts, score them and weigh them as planned: init and rates follow from all three.

    What could not be observed (scores behind other kernels, weights that were not watched) is for ``mue.check`` to measure.
    """
    blocks = [block for block in plan.target.blocks if block.experts]
    if routing is None or not blocks:
        return []
    faults = []
    active = sorted({block.active for block in blocks} - {routing.active})
    if active:
        faults.append(
            f"the model's routers choose {routing.active} experts per token, the plan has {', '.join(map(str, active))} active:"
            " set the config's number of experts per token to that, or plan for what the model has"
        )
    if routing.normalised is False and any(block.gates != MEASURED for block in blocks):
        faults.append(f"the plan's gates sum to one; the model's {routing.advice}")
    moments = {block.gate_moments[0] for block in blocks if block.gate_moments is not None}
    # 1 %: what measuring random routers is off by
    if routing.normalised and routing.scale and any(abs(m1 - routing.scale) > 1e-2 * routing.scale for m1 in moments):
        faults.append(
            f"the plan has measured gates with E[Σw] = {', '.join(map(number, sorted(moments)))}, and the model's sum to"
            f" {number(routing.scale)} for every token: plan without gates and gate_moments"
        )
    # one expert with a normalised weight has the weight 1, whatever its score
    scores = {block.router_kind.score for block in blocks if block.active > 1 or not block.normalize}
    if routing.score is not None and scores - {None, routing.score}:
        planned = ", ".join(sorted(s for s in scores if s not in (None, routing.score)))
        faults.append(
            f"the model's routers score with {routing.score}, the plan's with {planned}: plan with router = {routing.score!r},"
            " or set what the config calls its scoring function"
        )
    return faults


def _route_faults(planned: Iterable[float], routing: Routers | None) -> list[str]:
    """The model's own route scale must be the R that the plan leaves to the model."""
    wanted = {r for r in planned if r != 1} or {1.0}
    if routing is None or routing.scale is None:
        ask = wanted != {1.0}
        return ["the plan leaves R to the model, which has no route scale: fold with route='weights'"] if ask else []
    # the model's scale is a measured sum of gates, kept to four decimals (mue.layouts.transformers.shape)
    if any(abs(routing.scale - r) > 1e-3 * r for r in wanted):
        return [
            f"the model's routed sum is scaled by {number(routing.scale)}, the plan wants {', '.join(map(number, sorted(wanted)))}:"
            " set the config's routed_scaling_factor to that, or fold with route='weights' and set it to 1"
        ]
    return []


def _norm_faults(plan: PlanData, description: Description) -> list[str]:
    """A norm right after a projection cancels the residual multiplier, which its own gain then has to carry.

    What else is folded into the projection stood before that norm in the multiplier form too, and changes as little there.
    """
    if unfold(plan).residual_multiplier == 1:
        return []
    return [
        f"{f.pattern} ({f.row.role}) is followed by a norm that cancels its scale and has no gain of its own, so the plan's"
        " residual multiplier has no place: use a base of as many layers, or give that norm a gain"
        for f in description.patterns
        if f.row is not None and f.pattern in description.cancelled
    ]


def query_coefficients(plan: PlanData, model: nn.Module, params: Iterable[ParamInfo]) -> Mapping[str, float]:
    """By name, what the queries are multiplied by so that the stock attention scale becomes the planned one.

    It goes into the gain of the query norm where there is one, else into the query projection (docs/why/fold.md).

    Args:
        plan: has the planned scale. model: a stock one; any other needs nothing. params: the model's, with their roles.

    Returns:
        Canonical name → factor; empty where the model's own scale is the planned one.

    Raises:
        ValueError: a scale that differs where queries are not a tensor of their own.
    """
    if not is_stock(model):
        return {}
    inner, t = unwrap(model), plan.target
    size = integers(text_config(inner.config)).get("qk_head_dim", t.head_dim)
    # Latent attention multiplies q and k of qk_head_dim; the shape's head_dim is that of the values (shape._heads).
    # The planned scale is ∝ 1/d_head (docs/why/index.md#attention), so the ratio carries it over.
    wanted = plan.attention_scale * t.head_dim / size
    scales = [getattr(m, "scaling", None) for m in inner.modules()]
    found = {x for x in scales if isinstance(x, float)} or {
        family_of(str(getattr(inner.config, "model_type", ""))).attention_scale or size**-0.5
    }
    # one number computed in two ways: anything beyond rounding is another scale
    if all(abs(x - wanted) <= 1e-9 * wanted for x in found):
        return {}
    if len(found) > 1:
        raise ValueError(f"this model's layers scale attention differently ({', '.join(map(number, sorted(found)))})")
    c = wanted / found.pop()
    norms = {p.name: c for p in params if p.role == "qk_norm" and p.name.rsplit(".", 2)[-2].startswith("q")}
    if norms:
        return norms
    # of a low-rank query (q_a, q_b) the last matrix makes the queries; scaling both would scale twice
    queries = [p for p in params if p.role == "attention_q" and "q_a_proj" not in p.name]
    fused = [p.name for p in queries if p.layout.parts]
    if fused:
        raise ValueError(
            f"the plan's attention scale is {number(c)} of the model's, but {fused[0]} holds q, k and v in one tensor and"
            f" there is no query norm: use a base of head_dim {t.head_dim}"
        )
    return {p.name: c for p in queries}
