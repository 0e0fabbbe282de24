"""The layout of a model as it stands: the one that it declares, or, for a stock model, the one that is observed.

Above the observers, which need :mod:`mue.layouts.layout` below them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mue.layouts.diffusers.config import is_diffusers
from mue.layouts.diffusers.stock import observe_diffusers
from mue.layouts.layout import HasLayout, Layout, ParamInfo, unwrap
from mue.layouts.place import Placement, placement
from mue.layouts.transformers.stock import observe_stock


def layout_of(model: nn.Module) -> Sequence[Layout]:
    """The table a model declares, or, for a model of ``transformers`` or ``diffusers``, the one that is observed.

    Raises:
        ValueError: neither, with the fix; parameters of a stock model whose role cannot be decided.
    """
    inner = unwrap(model)
    if isinstance(inner, HasLayout):
        return inner.layout()
    if hasattr(getattr(inner, "config", None), "model_type"):
        return observe_stock(inner).description.layout()
    if is_diffusers(type(inner)):
        return observe_diffusers(inner).layout()
    raise ValueError(
        f"{type(inner).__name__} declares no parameter layout: give it a method layout() that returns mue.Layout rows"
        " (pattern, role, axes), one for each kind of parameter"
    )


def placed(model: nn.Module) -> list[ParamInfo]:
    """Every trainable parameter of a model with its role, in the model's order; a tied one once, under its first name.

    Args:
        model: on any device (meta too), wrapped or not.

    Raises:
        ValueError: as :func:`layout_of` and :func:`mue.layouts.place.placement` do.
    """
    return placement_of(model).planned


def placement_of(model: nn.Module) -> Placement:
    """:func:`placed`, with what the model's table says to leave alone (role ``"unplanned"``) beside it.

    Args:
        model: on any device, wrapped or not.

    Raises:
        ValueError: as :func:`placed` does.
    """
    return placement(model, layout_of(model))
