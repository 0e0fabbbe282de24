"""Which axis follows which number of the config: build the model on the meta device with one dimension doubled each time.

Nothing is allocated. A dimension is one thing a reader knows (width, experts, vocabulary); the words below find the
config's own name for it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mue.layouts.layout import canonical
from mue.layouts.transformers.tiny import numbers, parts, text_config

Build = Callable[[Any], nn.Module]

DIMENSIONS: dict[str, str] = {
    "width": r"hidden_size|n_embd|d_model|model_dim",
    "vocabulary": r"(padded_)?vocab_size",
    "experts": r"(num_|n_|moe_)(local_|routed_|num_)?experts|num_experts|moe_num_experts|n_routed_experts",
    "expert width": r"(moe|expert)_(intermediate|ffn_hidden)_size|moe_ffn_hidden_size",
    "shared experts": r"(num_|n_|moe_num_)?(shared_experts|shared_expert)|num_shared_expert",
    "shared width": r"(moe_)?shared_experts?_(intermediate|ffn_hidden)_size|shared_intermediate_size",
    "ffn": r"intermediate_size(_mlp)?|ffn_dim|n_inner|ffn_hidden_size|d_ff",
    "heads": r"(num|n)_attention_heads|num_heads|n_heads?",
    "head size": r"(v_)?head_dim|kv_channels",
}


@dataclass(frozen=True)
class Follows:
    """Axes of every parameter (canonical names): which dimensions each follows, and whether it *is* the width.

    ``unbuilt`` lists the dimensions that could not be doubled, with the reason.
    """

    width: int
    axes: Mapping[str, tuple[frozenset[str], ...]]
    is_width: Mapping[str, tuple[bool, ...]]
    unbuilt: Mapping[str, str]


def sizes(build: Build, config: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the model, built on the meta device."""
    with torch.device("meta"):
        return {canonical(n): tuple(p.shape) for n, p in build(config).named_parameters()}


def attributes(config: Any, dimension: str) -> list[str]:
    """The config's names for a dimension, in its language part and what that nests."""
    return [k for part in parts(text_config(config)) for k in numbers(part) if re.fullmatch(DIMENSIONS[dimension], k)]


def size_of(config: Any, name: str) -> int | None:
    """A dimension's size; None where the config does not name it."""
    names = attributes(config, name)
    here = {k: v for part in parts(text_config(config)) for k, v in numbers(part).items()}
    return here[names[0]] if names else None


def follow(build: Build, config: Any) -> Follows:
    """Double each dimension in turn and compare shapes.

    Raises:
        ValueError: the config has no number that is the residual width.
    """
    width = size_of(config, "width")
    if width is None:
        raise ValueError(
            f"{type(config).__name__} has no number for the residual width (looked for {DIMENSIONS['width'].replace('|', ', ')})"
        )
    first = sizes(build, config)
    found: dict[str, list[set[str]]] = {n: [set() for _ in shape] for n, shape in first.items()}
    is_width = {n: tuple(s == width for s in shape) for n, shape in first.items()}
    unbuilt: dict[str, str] = {}
    for dimension in DIMENSIONS:
        named = attributes(config, dimension)
        if not named:
            continue
        other, reason = _doubled(build, config, named)
        if other is None or set(other) != set(first):
            unbuilt[dimension] = reason or "doubling it changes which parameters there are"
            continue
        for n, shape in first.items():
            for i, (a, b) in enumerate(zip(shape, other[n], strict=True)):
                if a != b:
                    found[n][i].add(dimension)
        if dimension == "width":
            is_width = {
                n: tuple(w and b == 2 * width for w, b in zip(is_width[n], other[n], strict=True)) for n in first
            }
    if "width" in unbuilt:
        raise ValueError(f"a model of twice the width cannot be built: {unbuilt['width']}")
    return Follows(width, {n: tuple(frozenset(s) for s in axes) for n, axes in found.items()}, is_width, unbuilt)


def _doubled(build: Build, config: Any, named: list[str]) -> tuple[dict[str, tuple[int, ...]] | None, str]:
    other = copy.deepcopy(config)
    for part in parts(text_config(other)):
        for name, value in numbers(part).items():
            if name in named:
                setattr(part, name, 2 * value)
    try:
        return sizes(build, other), ""
    except Exception as error:  # whatever the family's own code raises is the reason
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
