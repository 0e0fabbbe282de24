"""Which axis follows which number of the config: build the model on the meta device with one dimension doubled each time.

Nothing is allocated. A dimension is one thing a reader knows (width, experts, vocabulary);
:data:`mue.layouts.observe.names.DIMENSIONS` finds the config's own name for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mue.layouts.layout import canonical
from mue.layouts.observe.config import attributes, integers, size_of, subconfigs, text_config
from mue.layouts.observe.names import DIMENSIONS

Build = Callable[[Any], nn.Module]  # a config → its model, on the current default device


@dataclass(frozen=True)
class AxisSizes:
    """Axes of every parameter (canonical names): which dimensions each follows, and whether it *is* the width.

    Attributes:
        width: the config's residual width. axes: name → for each axis, the dimensions that it grows with.
        is_width: name → for each axis, whether it is as long as the residual width and grows with nothing else.
        unbuilt: dimensions that could not be doubled → the reason.
    """

    width: int
    axes: Mapping[str, tuple[frozenset[str], ...]]
    is_width: Mapping[str, tuple[bool, ...]]
    unbuilt: Mapping[str, str]


def parameter_shapes(build: Build, config: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a config's model by canonical name, built on the meta device."""
    with torch.device("meta"):
        return {canonical(n): tuple(p.shape) for n, p in build(config).named_parameters()}


def axis_sizes(build: Build, config: Any) -> AxisSizes:
    """Double each dimension in turn and compare shapes.

    Raises:
        ValueError: the config has no number that is the residual width.
    """
    width = size_of(config, "width")
    if width is None:
        raise ValueError(
            f"{type(config).__name__} has no number for the residual width (looked for {DIMENSIONS['width'].replace('|', ', ')}):"
            " call it so, or give the model a method layout() that says what its parameters are"
        )
    first = parameter_shapes(build, config)
    grows: dict[str, list[set[str]]] = {n: [set() for _ in shape] for n, shape in first.items()}
    is_width = {n: tuple(s == width for s in shape) for n, shape in first.items()}
    unbuilt: dict[str, str] = {}
    for dimension in DIMENSIONS:
        named = attributes(config, dimension)
        if not named:
            continue
        other, reason = _doubled(build, config, named)
        # one that takes parameters away says nothing about the axes of the others; more experts, each with its own, take none
        if other is None or not set(first) <= set(other):
            unbuilt[dimension] = reason or "doubling it changes which parameters there are"
            continue
        for n, shape in first.items():
            for i, (a, b) in enumerate(zip(shape, other[n], strict=True)):
                if a != b:
                    grows[n][i].add(dimension)
        # as long as the width now, and again at twice the width: an axis that happens to have its length is none
        if dimension == "width":
            is_width = {
                n: tuple(w and b == 2 * width for w, b in zip(is_width[n], other[n], strict=True)) for n in first
            }
    if "width" in unbuilt:
        raise ValueError(f"a model of twice the width cannot be built: {unbuilt['width']}")
    return AxisSizes(width, {n: tuple(frozenset(s) for s in axes) for n, axes in grows.items()}, is_width, unbuilt)


def _doubled(build: Build, config: Any, named: list[str]) -> tuple[dict[str, tuple[int, ...]] | None, str]:
    """The shapes with the named attributes doubled, or None and the reason."""
    other = copy.deepcopy(config)
    for part in subconfigs(text_config(other)):
        for name, value in integers(part).items():
            if name in named:
                setattr(part, name, 2 * value)
    try:
        return parameter_shapes(build, other), ""
    except Exception as error:  # whatever the family's own code raises is the reason
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
