"""DBRX: what it says of attention and experts stands in nested configs, which its default leaves empty."""

from __future__ import annotations

from mue.layouts.transformers.family import FAMILIES, Family

_NESTED = {"rope_theta": 10_000.0, "moe_num_experts": 8, "moe_top_k": 2, "clip_qkv": 8.0}


@FAMILIES.register("dbrx")
def dbrx() -> Family:
    return Family(defaults={"d_model": 2048}, nested_defaults=_NESTED, tiny=_NESTED)
