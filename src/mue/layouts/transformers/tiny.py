"""A tiny model of the same family: every size of a config made small, its structure kept."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

# The first pattern that matches a config's attribute gives its tiny size; sizes differ so that axes can be told apart.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size_per_layer_input", 112),
    (r"(padded_)?vocab_size", 112),
    (r"(moe_)?(num_|n_)?expert_groups?|n_group|num_expert_group", 2),
    (r"topk_group|limited_groups", 1),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|top_k|experts_per_token", 2),
    (r"(num_|n_|moe_num_)?(shared_experts|shared_expert)|moe_num_shared_experts|num_shared_expert", 1),
    (r"(num_|n_|moe_)(local_|routed_|num_)?experts|num_experts|moe_num_experts|n_routed_experts", 8),
    (r"(moe_)?shared_experts?_(intermediate|ffn_hidden)_size|shared_intermediate_size", 40),
    (r"(moe|expert)_(intermediate|ffn_hidden)_size|moe_ffn_hidden_size|intermediate_size_moe", 48),
    (r"intermediate_size(_mlp)?|ffn_dim|n_inner|d_inner|ffn_hidden_size|dff|d_ff", 80),
    (r"hidden_size|n_embd|d_model|dim|embedding_size|word_embed_proj_dim", 64),
    (r"(num|n)_key_value_heads|num_kv_heads|kv_n_heads|num_global_key_value_heads", 2),
    (r"(num|n)_attention_heads|num_heads|n_heads?|encoder_attention_heads|decoder_attention_heads", 4),
    (r"qk_rope_head_dim|rotary_dim|qk_nope_head_dim", 8),
    (r"v_head_dim|head_dim|kv_channels|global_head_dim|attention_head_dim", 16),
    (r"q_lora_rank|q_rank", 24),
    (r"kv_lora_rank|o_lora_rank", 20),
    (r"moe_latent_size|.*_lora_rank|.*_rank", 12),
    (r"mamba_d_head", 16),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx", 128),
)
LAYERS = r"num_hidden_layers|n_layers?|num_layers|decoder_layers"


def text_config(config: Any) -> Any:
    """The language model's part of a config (the config itself where there is only one)."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return config


def parts(config: Any) -> Iterator[Any]:
    """A config and the ones nested in it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from parts(value)


def numbers(config: Any) -> dict[str, int]:
    """A config's whole numbers above 0, by attribute; booleans left out."""
    return {k: v for k, v in vars(config).items() if type(v) is int and v > 0 and not k.startswith("_")}


def shrink(config: Any, layers: int, overrides: dict[str, Any] | None = None) -> Any:
    """A copy of ``config`` with ``layers`` layers and small sizes.

    Lists with one entry per layer (kinds of layers) keep one entry of each kind, in order.
    """
    small = copy.deepcopy(config)
    for part in parts(small):
        if getattr(part, "is_heterogeneous", False):
            part.per_layer_config = None  # sizes that differ by layer: names and axes do not
        _shrink_one(part, layers, overrides or {})
    return small


def _shrink_one(config: Any, layers: int, overrides: dict[str, Any]) -> None:
    deep = next((v for k, v in numbers(config).items() if re.fullmatch(LAYERS, k)), None)
    kept = _kept_layers(config, deep, layers) if deep else []
    full = numbers(config)
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
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        if value is not None:
            setattr(config, key, 1 if not isinstance(value, list) else [1])


def _keep_relations(config: Any, full: dict[str, int]) -> None:
    """Sizes that a config derives from others: the parts of latent attention's heads."""
    now = numbers(config)
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
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), None)


def _kept_layers(config: Any, deep: int, layers: int) -> list[int]:
    """Which layers stay: one of each kind that the per-layer lists tell apart, filled up from the front."""
    lists = [v for v in vars(config).values() if isinstance(v, list) and len(v) == deep]
    kinds = [tuple(repr(v[i]) for v in lists) for i in range(deep)]
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())
    fill = [i for i in range(deep) if i not in first.values()]
    return sorted((chosen + fill)[: max(layers, len(chosen))])


def shrunk_enough(config: Any, patterns: Callable[[Any], set[str]], overrides: dict[str, Any] | None = None) -> Any:
    """The smallest of a few tiny configs whose parameters have the same name patterns as the full one's."""
    wanted = patterns(config)
    small = config
    for layers in (2, 4, 8, 16, 10_000):
        small = shrink(config, layers, overrides)
        if patterns(small) >= wanted:
            return small
    return small
