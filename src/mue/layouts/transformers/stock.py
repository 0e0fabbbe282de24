"""A stock model of ``transformers``: what is known of it by observation."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from mue.layouts.layout import Layout, unwrap
from mue.layouts.observe.axis_sizes import Build
from mue.layouts.observe.describe import Description
from mue.layouts.transformers.describe import describe_config
from mue.layouts.transformers.shape import Routers, routers

# What a config says of itself, and not of the model.
_SAYINGS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "mue")


@dataclass(frozen=True)
class StockModel:
    """A stock family as observed: its description and how its routers weigh experts."""

    description: Description
    routing: Routers | None


def is_stock(model: nn.Module) -> bool:
    """Whether a model comes with a transformers config, which says how to build it again at a tiny size.

    Args:
        model: wrapped or not.
    """
    config = getattr(unwrap(model), "config", None)
    return hasattr(config, "model_type") and hasattr(config, "to_dict")


def observe_stock(model: nn.Module) -> StockModel:
    """What is known of a stock model; observed once for each class and config.

    Args:
        model: one for which :func:`is_stock` holds. Rows of the user's own, for what cannot be decided, stand in its
            ``layout_rows`` (of the class or the instance) and win.

    Raises:
        ValueError: a family that cannot be built and run at a tiny size.
    """
    inner = unwrap(model)
    config: Any = inner.config
    key = json.dumps({k: v for k, v in config.to_dict().items() if k not in _SAYINGS}, sort_keys=True, default=str)
    kind: Any = type(inner)
    return _observed(kind, _Keyed(key, config), tuple(getattr(inner, "layout_rows", ())))


def eager(kind: Any) -> Build:
    """What builds a class of transformers with attention of plain products and a softmax: what is observed has to be operators.

    Args:
        kind: the model's class, which is called with a config.
    """

    def build(config: Any) -> nn.Module:
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
        made: nn.Module = kind(config)
        return made

    return build


@dataclass(frozen=True)
class _Keyed:
    """A config that hashes by its text, so that observations can be kept."""

    key: str
    config: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=32)  # every function of mue.model asks anew
def _observed(kind: Any, keyed: _Keyed, rows: tuple[Layout, ...]) -> StockModel:
    build = eager(kind)
    description = describe_config(keyed.config, rows, build)
    routing = routers(keyed.config, description, lambda other: describe_config(other, rows, build))
    return StockModel(description, routing)
