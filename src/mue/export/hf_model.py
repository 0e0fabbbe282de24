"""The module that an export for a stock model is written for: the user's, one of a transformers config, or of the plan's shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mue.export.rows import refuse_images
from mue.layouts.transformers.configs import build, default_config, read_config
from mue.shapes import Transformer
from mue.shapes.block import Block
from mue.util.importing import user_code


def transformers_model(target: Transformer, given: Any) -> tuple[nn.Module, str]:
    """A module on the meta device, and what it is for people.

    Args:
        target: the planned shape. given: a module, a transformers config, or the path or family of one; None: ``qwen3``,
            ``qwen3_moe``, ``lfm2_moe`` or ``glm4_moe`` in the planned shape, where one of them has it.

    Raises:
        ValueError: no such config; a shape that none of the four has; one that draws images.
    """
    if isinstance(given, nn.Module):
        return given, type(given).__name__
    if isinstance(given, list | tuple):
        raise ValueError("rows of paths are for optax; give a module, or a transformers config, its path or its family")
    refuse_images(target)
    try:
        config, sizes = _config_of(target) if given is None else (given, "")
    except ValueError as error:
        raise ValueError(f"{error}: give a config with --model") from None
    config = read_config(config) if isinstance(config, str | Path) else config
    # names and shapes are all that an export reads, and a model may be larger than this machine
    with torch.device("meta"), user_code(type(config).__name__):
        module = build(config)
    return module, f"{type(module).__name__}{sizes}"


def stock_config(target: Transformer) -> Any:
    """The config of ``qwen3``, ``qwen3_moe``, ``lfm2_moe`` or ``glm4_moe`` in a shape's numbers.

    Raises:
        ValueError: a shape that none of the four has, with what differs.
    """
    return _config_of(target)[0]


def _config_of(target: Transformer) -> tuple[Any, str]:
    """(config, its own numbers in words) of the family that has the planned shape."""
    family, sizes = _family(target)
    sizes |= {
        "vocab_size": target.vocab,
        "hidden_size": target.width,
        "num_hidden_layers": target.layers,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "tie_word_embeddings": target.tied,
    }
    config = type(default_config(family))(**sizes)
    return config, f", model_type {family!r} with {', '.join(f'{k}={v!r}' for k, v in sizes.items())}"


def _family(target: Transformer) -> tuple[str, dict[str, Any]]:
    """(family, its sizes) with the planned layers: qwen3, qwen3_moe (softmax), lfm2_moe (sigmoid) or glm4_moe (sigmoid, shared experts)."""
    dense = list({block.ffn for block in target.blocks if not block.is_moe})
    moe = list({_kind(block) for block in target.blocks if block.is_moe})
    is_moe = [block.is_moe for block in target.per_layer]
    differs = [
        "a feed-forward without a gate" if not target.gated else "",
        f"dense layers of {len(dense)} widths" if len(dense) > 1 else "",
        f"{len(moe)} kinds of blocks with experts" if len(moe) > 1 else "",
        *{f"experts chosen a/g from each of {b.groups} groups" for b in target.blocks if b.groups > 1},
    ]
    if any(differs):
        raise ValueError(
            f"no default transformers model has the layers of {target.name} ({', '.join(filter(None, differs))})"
        )
    sizes: dict[str, Any] = {"intermediate_size": dense[0]} if dense else {}
    if not moe:
        return "qwen3", sizes
    expert, experts, active, shared, width, router, normalize = moe[0]
    if router == "softmax" and not shared:
        # Qwen3-MoE names its dense layers one by one, so they may lie anywhere
        skipped = [i for i, here in enumerate(is_moe) if not here]
        sizes |= {"mlp_only_layers": skipped, "moe_intermediate_size": expert, "num_experts": experts}
        return "qwen3_moe", {**sizes, "num_experts_per_tok": active, "norm_topk_prob": normalize}
    first = is_moe.index(True)
    # LFM2-MoE without its convolutions: dense layers first, then experts with sigmoid scores
    if router == "sigmoid" and all(is_moe[first:]) and not shared:
        sizes |= {"num_dense_layers": first, "moe_intermediate_size": expert, "num_experts": experts}
        sizes |= {"num_experts_per_tok": active, "norm_topk_prob": normalize, "routed_scaling_factor": 1.0}
        return "lfm2_moe", {**sizes, "layer_types": ["full_attention"] * target.layers}
    # GLM-4-MoE: the same with shared experts, as wide as routed ones
    if router == "sigmoid" and all(is_moe[first:]) and width == shared * expert:
        sizes |= {"first_k_dense_replace": first, "moe_intermediate_size": expert, "n_routed_experts": experts}
        sizes |= {"n_shared_experts": shared, "num_experts_per_tok": active, "norm_topk_prob": normalize}
        return "glm4_moe", {**sizes, "use_qk_norm": True, "routed_scaling_factor": 1.0}
    raise ValueError(
        f"no default transformers model has the experts of {target.name} ({router} gates, {shared} shared experts)"
    )


def _kind(block: Block) -> tuple[Any, ...]:
    shared = block.shared_experts, block.shared_width
    return block.expert, block.experts, block.active, *shared, block.router, block.normalize
