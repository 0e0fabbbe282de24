"""Gemma 4: dense by default, and with a second embedding for every layer, which models with experts do not have."""

from __future__ import annotations

from mue.layouts.transformers.family import FAMILIES, Family


@FAMILIES.register("gemma4_text")
def gemma4_text() -> Family:
    return Family(
        defaults={
            "enable_moe_block": True,
            "num_experts": 64,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
            "hidden_size_per_layer_input": 0,
        }
    )
