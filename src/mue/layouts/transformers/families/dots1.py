"""dots.llm1: its default config counts no experts."""

from __future__ import annotations

from mue.layouts.transformers.family import FAMILIES, Family


@FAMILIES.register("dots1")
def dots1() -> Family:
    return Family(
        defaults={"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
    )
