"""Hunyuan: its default config counts one expert and no size of heads."""

from __future__ import annotations

from mue.layouts.transformers.family import FAMILIES, Family


@FAMILIES.register("hunyuan_v1_moe")
def hunyuan_v1_moe() -> Family:
    return Family(defaults={"num_experts": 16, "moe_topk": 4, "head_dim": 128})
