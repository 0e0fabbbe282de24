"""A plan on a stock model: its layout by observation, and what has to hold because its forward code stays as it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from mue.fold.plan import unfold
from mue.layouts.describe import Description
from mue.layouts.families import describe_config
from mue.layouts.scalings import scalings
from mue.layouts.shape import Routers, routers
from mue.layouts.tiny import numbers, text_config
from mue.plan import Plan
from mue.roles import Layout, Placed, unwrap
from mue.words import number

# What a config says of itself, and not of the model.
_SAYINGS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "mue")


@dataclass(frozen=True)
class Stock:
    """A stock family as observed: its description and how its routers weigh experts."""

    description: Description
    routing: Routers | None


def is_stock(model: nn.Module) -> bool:
    """Whether a model comes with a transformers config that says how to build it again."""
    config = getattr(unwrap(model), "config", None)
    return hasattr(config, "model_type") and hasattr(config, "to_dict")


def stock(model: nn.Module) -> Stock:
    """What is known of a stock model; observed once for each class and config.

    Rows of the user's own, for what cannot be decided, stand in ``model.layout_rows`` (of the class or the instance) and win.

    Raises:
        ValueError: a family that cannot be built and run at a tiny size.
    """
    inner = unwrap(model)
    config: Any = inner.config
    key = json.dumps({k: v for k, v in config.to_dict().items() if k not in _SAYINGS}, sort_keys=True, default=str)
    kind: Any = type(inner)
    return _observed(kind, _Keyed(key, config), tuple(getattr(inner, "layout_rows", ())))


@dataclass(frozen=True)
class _Keyed:
    """A config that hashes by its text, so that observations can be kept."""

    key: str
    config: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=32)
def _observed(kind: Any, keyed: _Keyed, rows: tuple[Layout, ...]) -> Stock:
    def build(config: Any) -> nn.Module:
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
        made: nn.Module = kind(config)
        return made

    description = describe_config(keyed.config, rows, build)
    routing = routers(keyed.config, description, lambda other: describe_config(other, rows, build))
    return Stock(description, routing)


def stock_faults(plan: Plan, model: nn.Module) -> list[str]:
    """Why a plan cannot be applied to a stock model as it stands, each with the way out."""
    if not is_stock(model):
        return []
    config, known = unwrap(model).config, stock(model)
    faults = [
        f"{s.attribute} = {s.value:g} already scales the {s.what}, and the plan would scale it twice: set {s.attribute} = {s.neutral:g}"
        for s in scalings(config)
        if s.active
    ]
    multipliers = plan.multipliers
    if multipliers.residual != 1 or multipliers.head != 1 or any(a != 1 for a in multipliers.output):
        return [*faults, "a stock model has no forward multipliers: use mue.fold.fold(plan)"]
    return faults + _route_faults(multipliers.route, known.routing) + _norm_faults(plan, known.description)


def _route_faults(planned: Iterable[float], routing: Routers | None) -> list[str]:
    """The model's own route scale must be the R that the plan leaves to the model."""
    wanted = {r for r in planned if r != 1} or {1.0}
    if routing is None or routing.scale is None:
        ask = wanted != {1.0}
        return ["the plan leaves R to the model, which has no route scale: fold with route='weights'"] if ask else []
    if any(abs(routing.scale - r) > 1e-3 * r for r in wanted):
        return [
            f"the model's routed sum is scaled by {number(routing.scale)}, the plan wants {', '.join(map(number, sorted(wanted)))}:"
            " set the config's routed_scaling_factor to that, or fold with route='weights' and set it to 1"
        ]
    return []


def _norm_faults(plan: Plan, description: Description) -> list[str]:
    """A norm right after a projection cancels the residual multiplier, which its own gain then has to carry.

    What else is folded into the projection stood before that norm in the multiplier form too, and changes as little there.
    """
    if unfold(plan).residual_multiplier == 1:
        return []
    return [
        f"{f.pattern} ({f.row.role}) is followed by a norm that cancels its scale and has no gain of its own, so the plan's"
        " residual multiplier has no place: use a base of as many layers, or give that norm a gain"
        for f in description.found
        if f.row is not None and f.pattern in description.cancelled
    ]


def query_coefficients(plan: Plan, model: nn.Module, placed: Iterable[Placed]) -> Mapping[str, float]:
    """By name, what the queries are multiplied by so that the stock attention scale becomes the planned one.

    It goes into the gain of the query norm where there is one, else into the query projection.

    Raises:
        ValueError: a scale that differs where queries are not a tensor of their own.
    """
    if not is_stock(model):
        return {}
    inner, t = unwrap(model), plan.target
    size = numbers(text_config(inner.config)).get("qk_head_dim", t.head_dim)
    wanted = plan.attention_scale * t.head_dim / size
    scales = [getattr(m, "scaling", None) for m in inner.modules()]
    found = {x for x in scales if isinstance(x, float)} or {size**-0.5}
    if all(abs(x - wanted) <= 1e-9 * wanted for x in found):
        return {}
    if len(found) > 1:
        raise ValueError(f"this model's layers scale attention differently ({', '.join(map(number, sorted(found)))})")
    c = wanted / found.pop()
    norms = {p.name: c for p in placed if p.role == "qk_norm" and p.name.rsplit(".", 2)[-2].startswith("q")}
    if norms:
        return norms
    queries = [p for p in placed if p.role == "attention_q" and "q_a_proj" not in p.name]
    fused = [p.name for p in queries if p.layout.parts]
    if fused:
        raise ValueError(
            f"the plan's attention scale is {number(c)} of the model's, but {fused[0]} holds q, k and v in one tensor and"
            f" there is no query norm: use a base of head_dim {t.head_dim}"
        )
    return {p.name: c for p in queries}
