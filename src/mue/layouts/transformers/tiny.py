"""A tiny model of the same family: every size of a config made small, its structure kept."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

from mue.layouts.observe.config import integers, subconfigs
from mue.layouts.observe.names import LAYERS, TINY_SIZES


def shrink(config: Any, layers: int, overrides: Mapping[str, Any] | None = None) -> Any:
    """A copy of ``config`` with ``layers`` layers and small sizes.

    Lists with one entry per layer (kinds of layers) keep one entry of each kind, in order.
    """
    small = copy.deepcopy(config)
    for part in subconfigs(small):
        if getattr(part, "is_heterogeneous", False):
            part.per_layer_config = None  # sizes that differ by layer: names and axes do not
        _shrink_one(part, layers, overrides or {})
    return small


def _shrink_one(config: Any, layers: int, overrides: Mapping[str, Any]) -> None:
    """One config, in place. Sizes only ever fall, but for what the family's own file sets."""
    deep = next((v for k, v in integers(config).items() if re.fullmatch(LAYERS, k)), None)
    kept = _kept_layers(config, deep, layers) if deep else []
    full = integers(config)
    for key, value in list(vars(config).items()):
        if key.startswith("_"):
            continue
        if isinstance(value, list) and deep and len(value) == deep and len(kept) < deep:
            setattr(config, key, [value[i] for i in kept])
        elif type(value) is int and value > 0:
            size = len(kept) if re.fullmatch(LAYERS, key) and kept else _size(key)
            if size is not None and (size < value or size == len(kept)):
                setattr(config, key, size)
    for key, value in overrides.items():
        if hasattr(config, key):
            setattr(config, key, value)
    _keep_relations(config, full)
    # inside the small vocabulary: an embedding refuses a padding id beyond it
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        if value is not None:
            setattr(config, key, 1 if not isinstance(value, list) else [1])


def _keep_relations(config: Any, full: dict[str, int]) -> None:
    """Sizes that a config derives from others: the parts of latent attention's heads."""
    now = integers(config)
    for key, value in list(vars(config).items()):
        one = key.removesuffix("_per_layer")
        # the same number said layer by layer (Laguna's heads) shrinks with it, or it would contradict the small one
        if one != key and isinstance(value, list) and one in full and all(type(v) is int for v in value):
            setattr(config, key, [max(1, v * now[one] // full[one]) for v in value])
    rope, nope = now.get("qk_rope_head_dim"), now.get("qk_nope_head_dim")
    if rope and nope and "qk_head_dim" in full:
        config.qk_head_dim = rope + nope
    if "mamba_n_heads" in full and "mamba_expand" in full:
        config.mamba_n_heads = now["mamba_expand"] * now["hidden_size"] // now["mamba_d_head"]
    if rope and "head_dim" in full and full["head_dim"] == full.get("qk_rope_head_dim"):
        config.head_dim = rope
    elif rope and "head_dim" in full and full["head_dim"] == full.get("qk_head_dim"):
        config.head_dim = config.qk_head_dim
    if full.get("num_key_value_heads") == full.get("num_attention_heads") and "num_key_value_heads" in full:
        config.num_key_value_heads = config.num_attention_heads


def _size(key: str) -> int | None:
    return next((size for pattern, size in TINY_SIZES if re.fullmatch(pattern, key)), None)


def _kept_layers(config: Any, deep: int, layers: int) -> list[int]:
    """Which layers stay: one of each kind that the per-layer lists tell apart, filled up from the front."""
    lists = [v for v in vars(config).values() if isinstance(v, list) and len(v) == deep]
    kinds = [tuple(repr(v[i]) for v in lists) for i in range(deep)]
    # backwards, so that the first layer of each kind is the one that stays
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())
    fill = [i for i in range(deep) if i not in first.values()]
    return sorted((chosen + fill)[: max(layers, len(chosen))])


def shrunk_enough(config: Any, patterns: Callable[[Any], set[str]], overrides: Mapping[str, Any] | None = None) -> Any:
    """The smallest of a few tiny configs whose parameters have the same name patterns as the full one's."""
    wanted = patterns(config)
    small = config
    # Families have several kinds of layers (dense ones first, say): as few as show every kind, at the last all of them.
    for layers in (2, 4, 8, 16, 10_000):
        small = shrink(config, layers, overrides)
        if patterns(small) >= wanted:
            return small
    return small
