"""DeepSeek-V2: its default config routes without groups, and says so by leaving them out."""

from __future__ import annotations

from mue.layouts.transformers.family import FAMILIES, Family


@FAMILIES.register("deepseek_v2")
def deepseek_v2() -> Family:
    return Family(defaults={"num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1})
