"""The keywords of a class of ``diffusers`` as a config with a width, and the model of such a config at any size."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

from mue.layouts.diffusers.family import image_family_of
from mue.layouts.observe.names import LAYERS
from mue.util.errors import nearest

# How classes say their width: as it is, or as a number of heads times the size of one.
_WIDTHS = ("hidden_size", "model_dim", "dim")
_HEADS, _HEAD_SIZE = "num_attention_heads", "attention_head_dim"
# Keywords that have to be the residual width: projected captions join the stream of images, or its attention.
_FOLLOW = ("cross_attention_dim", "caption_projection_dim")


def is_diffusers(kind: type) -> bool:
    """Whether a class of models is of ``diffusers``, or made of one of its classes; asks without importing the library."""
    return any(base.__module__.startswith("diffusers.models.transformers") for base in kind.__mro__)


def image_classes() -> list[str]:
    """Every transformer of the installed ``diffusers`` that draws images, as ``mue inspect`` takes it; none where it is not there."""
    try:
        library, models = (importlib.import_module(name) for name in ("diffusers", "diffusers.models.transformers"))
    except ImportError:
        return []
    return [f"diffusers.{name}" for name in sorted(dir(models)) if name.endswith("2DModel") and name in dir(library)]


def image_config(kind: type[nn.Module], given: Mapping[str, Any], where: str = "the config") -> SimpleNamespace:
    """A class's keywords as a config with a ``hidden_size``; what follows from sizes is put aside, so that these can be changed.

    Args:
        kind: of ``diffusers``. given: some of its keywords; the class's own values stand for the others. where: for messages.

    Raises:
        ValueError: an unknown keyword; a class that does not say its width.
    """
    known = {n: p.default for n, p in list(inspect.signature(kind.__init__).parameters.items())[1:]}
    for name in given:
        if name not in known and not name.startswith("_"):
            raise ValueError(f"{where}: {kind.__name__} knows no {name!r}{nearest(name, list(known))}")
    values = {**known, **image_family_of(kind).defaults, **{k: v for k, v in given.items() if k in known}}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    width = _take_width(kind, values)
    layers = sum(v for k, v in values.items() if type(v) is int and re.fullmatch(LAYERS, k))
    heads = values.get(_HEADS)
    head = width // heads if type(heads) is int and heads else 0
    sizes = {k: v for k, v in values.items() if isinstance(v, tuple) and v and all(type(n) is int for n in v)}
    # the axes of a rotation share the channels of a head, and what each block has for itself is counted by block
    axes = {k: v for k, v in sizes.items() if sum(v) == head and len(v) > 1}
    aside = {
        "_follow": tuple(k for k in _FOLLOW if values.get(k) == width),
        "_axes": axes,
        "_by_block": {k: v for k, v in sizes.items() if len(v) == layers and k not in axes},
    }
    kept = {k: v for k, v in values.items() if not any(k in names for names in aside.values())}
    # called as the class is: messages name it
    named: type[SimpleNamespace] = type(f"{kind.__name__}Config", (SimpleNamespace,), {})
    return named(hidden_size=width, **kept, **aside)


def _take_width(kind: type, values: dict[str, Any]) -> int:
    """The width, taken out of a class's keywords in whatever form they have it."""
    heads, size = values.get(_HEADS), values.get(_HEAD_SIZE)
    own = next((name for name in _WIDTHS if type(values.get(name)) is int), None)
    if own is None and type(heads) is int and type(size) is int:
        del values[_HEAD_SIZE]
        return heads * size
    # a width beside heads of a size of their own: which follows which is not said
    if own is None or _HEAD_SIZE in values:
        raise ValueError(
            f"{kind.__name__} says its width neither as {_HEADS} times {_HEAD_SIZE} nor as {' or '.join(_WIDTHS)}: give the model"
            " a method layout() that says what its parameters are (mue inspect --propose)"
        )
    width: int = values.pop(own)
    return width


def build_image(kind: Any, config: SimpleNamespace) -> nn.Module:
    """The model of an :func:`image_config`, on the current default device.

    Raises:
        ValueError: its class builds none of these values; with its own error.
    """
    values = dict(vars(config))
    width, follow, axes, by_block = (values.pop(k) for k in ("hidden_size", "_follow", "_axes", "_by_block"))
    known = inspect.signature(kind.__init__).parameters
    own = next((name for name in _WIDTHS if name in known), None)
    said = {_HEAD_SIZE: width // values[_HEADS]} if own is None else {own: width}
    layers = sum(v for k, v in values.items() if type(v) is int and re.fullmatch(LAYERS, k))
    said |= dict.fromkeys(follow, width)
    said |= {k: _shared(width // values[_HEADS], v) for k, v in axes.items()}
    said |= {k: v[:layers] for k, v in by_block.items()}
    try:
        made: nn.Module = kind(**values, **said)
    except Exception as error:  # the class's own: several leave open what every model needs
        first = (str(error).splitlines() or [""])[0][:160]
        raise ValueError(
            f"{kind.__name__} cannot be built of its keywords at width {width} ({type(error).__name__}: {first}): give them as JSON"
            " (--config), where its class leaves them open"
        ) from error
    return made


def _shared(head: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The channels of a head, shared by the axes of a rotation as they were, an even number each."""
    first = tuple(max(2, 2 * round(head * n / (2 * sum(axes)))) for n in axes[:-1])
    return (*first, head - sum(first))
