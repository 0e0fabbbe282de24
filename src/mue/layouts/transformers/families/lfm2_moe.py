"""LFM2: its default config does not say which layers are convolutions."""

from __future__ import annotations

from mue.layouts.transformers.family import FAMILIES, Family


@FAMILIES.register("lfm2_moe")
def lfm2_moe() -> Family:
    return Family(defaults={"layer_types": ["conv", "full_attention"] * 16, "num_dense_layers": 1})
