"""A stock model of ``diffusers``: its config in the words that observers know, and its parameters as observed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mue.layouts.layout import Layout, unwrap
from mue.layouts.observe.describe import Description
from mue.layouts.observe.of_image import decide_of_image
from mue.layouts.transformers.describe import describe_config
from mue.util.errors import nearest

# Keywords that have to be the residual width: projected captions join the stream of images, or its attention.
_WIDTHS = ("cross_attention_dim", "caption_projection_dim")
_IMAGES, _WORDS, _SIDE = 2, 5, 4  # of the tiny forward pass: images, words of a caption, patches along a side


def is_diffusers(kind: type) -> bool:
    """Whether a class of models is of ``diffusers``, or made of one of its classes; asks without importing the library."""
    return any(base.__module__.startswith("diffusers.models.transformers") for base in kind.__mro__)


def image_config(kind: type[nn.Module], given: Mapping[str, Any], where: str = "the config") -> SimpleNamespace:
    """A class's keywords as a config with a ``hidden_size``, which these classes have as heads times the size of one.

    Args:
        kind: of ``diffusers``. given: some of its keywords; the class's own values stand for the others. where: for messages.

    Raises:
        ValueError: an unknown keyword; a class that has no such heads.
    """
    known = {n: p.default for n, p in list(inspect.signature(kind.__init__).parameters.items())[1:]}
    for name in given:
        if name not in known and not name.startswith("_"):
            raise ValueError(f"{where}: {kind.__name__} knows no {name!r}{nearest(name, list(known))}")
    values = known | {k: v for k, v in given.items() if k in known}
    heads, size = values.get("num_attention_heads"), values.pop("attention_head_dim", None)
    if type(heads) is not int or type(size) is not int:
        raise ValueError(
            f"{kind.__name__} does not say its width as num_attention_heads times attention_head_dim: give the model a method"
            " layout() that says what its parameters are (mue inspect --propose)"
        )
    width = heads * size
    # called as the class is: messages name it
    named: type[SimpleNamespace] = type(f"{kind.__name__}Config", (SimpleNamespace,), {})
    return named(hidden_size=width, **{k: v for k, v in values.items() if not (k in _WIDTHS and v == width)})


def build_image(kind: Any, config: SimpleNamespace) -> nn.Module:
    """The model of an :func:`image_config`, on the current default device."""
    values = dict(vars(config))
    width = values.pop("hidden_size")
    known = inspect.signature(kind.__init__).parameters
    own = {k: width for k in _WIDTHS if k in known and k not in values}
    made: nn.Module = kind(attention_head_dim=width // values["num_attention_heads"], **values, **own)
    return made


def run_images(model: nn.Module) -> object:
    """Call a model on a few random images with whatever its forward takes beside them.

    Raises:
        ValueError: it takes something that is not known here.
    """
    config: Any = model.config
    side = _SIDE * getattr(config, "patch_size", 1)
    labels = getattr(config, "num_embeds_ada_norm", None) or 1
    text = getattr(config, "caption_channels", None) or getattr(config, "joint_attention_dim", None)
    text = text or config.num_attention_heads * config.attention_head_dim  # read as they are
    known = {
        "hidden_states": torch.randn(_IMAGES, config.in_channels, side, side),
        "timestep": torch.arange(1, _IMAGES + 1),
        "class_labels": torch.arange(_IMAGES) % labels,
        "encoder_hidden_states": torch.randn(_IMAGES, _WORDS, text),
        "pooled_projections": torch.randn(_IMAGES, getattr(config, "pooled_projection_dim", None) or 1),
        "added_cond_kwargs": {"resolution": torch.rand(_IMAGES, 2), "aspect_ratio": torch.rand(_IMAGES, 1)},
    }
    takes = inspect.signature(model.forward).parameters
    if other := [n for n, p in takes.items() if p.default is p.empty and n not in known]:
        raise ValueError(f"{type(model).__name__} needs {', '.join(other)}, which it cannot be run without here")
    return model(**{name: value for name, value in known.items() if name in takes})


def describe_images(kind: type[nn.Module], config: Any, rows: Sequence[Layout] = ()) -> Description:
    """Roles for every parameter of an :func:`image_config` of any size, observed on a tiny model of the class.

    Raises:
        ValueError: a class that cannot be built and run at a tiny size.
    """
    # PixArt reads the sizes of a picture by thirds of the width
    return describe_config(
        config, rows, partial(build_image, kind), run_images, decide_of_image, sizes={"hidden_size": 96}
    )


def observe_diffusers(model: nn.Module) -> Description:
    """What is known of a stock model, observed once for each class and config; its ``layout_rows`` win.

    Raises:
        ValueError: as :func:`image_config` and :func:`describe_images` do.
    """
    inner: Any = unwrap(model)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in inner.config.items() if not k.startswith("_")}
    kind: Any = type(inner)
    return _observed(kind, tuple(sorted(given.items())), tuple(getattr(inner, "layout_rows", ())))


@lru_cache(maxsize=32)  # every function of mue.model asks anew
def _observed(kind: type[nn.Module], given: tuple[tuple[str, Any], ...], rows: tuple[Layout, ...]) -> Description:
    return describe_images(kind, image_config(kind, dict(given)), rows)
