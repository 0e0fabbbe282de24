"""What the forward of a diffusion transformer takes, by the words that ``diffusers`` has for it, and of which kind each is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_IMAGES, _WORDS, _SIDE = 2, 5, 4  # of the tiny forward pass: images, words of a caption, patches along a side


@dataclass(frozen=True)
class Input:
    """One keyword of a forward.

    Attributes:
        kind: ``image``, ``time``, ``class``, ``text`` (a vector for each word), ``vector`` (a caption's or another condition's one
            vector or number); empty for what is no value to be read (positions).
        make: what is given, of a model's config; None where the model is not built for it.
    """

    kind: str
    make: Callable[[Any], Any]


def _first(config: Any, *names: str) -> int:
    """The first of a config's numbers that is one, or of a tuple of numbers the first; else the width, read as it is.

    Raises:
        ValueError: the config has none of them, nor heads of a size.
    """
    for name in names:
        found = getattr(config, name, None)
        if isinstance(found, list | tuple) and found:
            found = found[0]
        if type(found) is int:
            return found
    heads, size = (getattr(config, name, None) for name in ("num_attention_heads", "attention_head_dim"))
    if type(heads) is not int or type(size) is not int:
        raise ValueError(f"the config does not say how long what it reads is (looked for {', '.join(names)})")
    return heads * size


def _captions(config: Any) -> torch.Tensor:
    width = _first(
        config, "caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cross_attention_dim"
    )
    return torch.randn(_IMAGES, _WORDS, width)


def _llama(config: Any) -> torch.Tensor:
    """A caption from each layer of a language model, of which blocks read one each."""
    return torch.randn(1 + max(config.llama_layers), _IMAGES, _WORDS, config.caption_channels[1])


def _pooled(config: Any) -> torch.Tensor:
    return torch.randn(_IMAGES, _first(config, "pooled_projection_dim", "text_emb_dim"))


def _axes(config: Any) -> int:
    """How many numbers the place of a patch is: frame, row and column, unless a rotation has more axes."""
    return max(3, len(getattr(config, "axes_dims_rope", ())))


def _grid(config: Any) -> torch.Tensor:
    """(patches, axes): of each patch in which row and column it is."""
    at = torch.arange(_SIDE)
    ids = torch.zeros(_SIDE * _SIDE, _axes(config))
    ids[:, 1:3] = torch.cartesian_prod(at, at)
    return ids


INPUTS: Mapping[str, Input] = {
    "timestep": Input("time", lambda c: torch.arange(1, _IMAGES + 1)),
    "timesteps": Input("time", lambda c: torch.arange(1, _IMAGES + 1)),
    "class_labels": Input("class", lambda c: torch.arange(_IMAGES) % (getattr(c, "num_embeds_ada_norm", None) or 1)),
    "encoder_hidden_states": Input("text", _captions),
    "encoder_hidden_states_t5": Input("text", _captions),
    "encoder_hidden_states_llama3": Input("text", _llama),
    "pooled_projections": Input("vector", _pooled),
    "pooled_embeds": Input("vector", _pooled),
    "guidance": Input("vector", lambda c: torch.rand(_IMAGES) if getattr(c, "guidance_embeds", False) else None),
    "added_cond_kwargs": Input(
        "vector", lambda c: {"resolution": torch.rand(_IMAGES, 2), "aspect_ratio": torch.rand(_IMAGES, 1)}
    ),
    "img_ids": Input("", _grid),
    "txt_ids": Input("", lambda c: torch.zeros(_WORDS, _axes(c))),
    "img_shapes": Input("", lambda c: [(1, _SIDE, _SIDE)] * _IMAGES),
    "encoder_attention_mask": Input("", lambda c: torch.ones(_IMAGES, _WORDS, dtype=torch.bool)),
    "encoder_hidden_states_mask": Input("", lambda c: torch.ones(_IMAGES, _WORDS, dtype=torch.bool)),
}


def _map(config: Any) -> torch.Tensor:
    """(images, channels, rows, columns): the model cuts its patches itself."""
    patch = getattr(config, "patch_size", None) or 1
    if type(patch) is not int:
        raise ValueError(f"patches of {patch}, as of videos, which are not observed here")
    side = _SIDE * patch
    return torch.randn(_IMAGES, config.in_channels, side, side)


def _patches(config: Any) -> torch.Tensor:
    """(images, patches, numbers of a patch): cut already."""
    return torch.randn(_IMAGES, _SIDE * _SIDE, config.in_channels)


# How images may be handed over; which of them a class takes, no config says.
_IMAGE = {"as maps": Input("image", _map), "as rows of patches": Input("image", _patches)}


def check_inputs(kind: type) -> None:
    """Refuse a class before anything is built.

    Raises:
        ValueError: its forward needs something that is not known here.
    """
    takes, known = inspect.signature(kind.forward).parameters, ("self", "hidden_states", *INPUTS)  # type: ignore[attr-defined]
    if other := [n for n, p in takes.items() if p.default is p.empty and n not in known]:
        raise ValueError(f"{kind.__name__} needs {', '.join(other)}, which it cannot be run without here")


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """Keywords to call a model with: the first form of images that it runs on, and whatever else its forward takes that is known.

    Raises:
        ValueError: it runs on no form; with the model's own errors.
    """
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    beside = {name: made for name, i in INPUTS.items() if name in takes and (made := i.make(config)) is not None}
    errors = []
    for form, image in _IMAGE.items():
        given = {"hidden_states": image.make(config), **beside}
        try:
            with torch.no_grad():
                model(**given)
        except Exception as error:  # the model's own: another form may be what it takes
            errors.append(f"{form}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}")
            continue
        return given
    raise ValueError(f"{type(model).__name__} runs on no images here ({'; '.join(errors)})")


def kinds_of(given: Mapping[str, Any]) -> dict[str, str]:
    """Keyword → kind of those that a model reads values of."""
    kinds = {"hidden_states": "image"} | {name: i.kind for name, i in INPUTS.items()}
    return {name: kinds[name] for name in given if kinds[name]}
