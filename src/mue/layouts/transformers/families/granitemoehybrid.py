"""Granite 4: its default config does not say which layers are attention."""

from __future__ import annotations

from mue.layouts.transformers.family import FAMILIES, Family


@FAMILIES.register("granitemoehybrid")
def granitemoehybrid() -> Family:
    return Family(defaults={"layer_types": ["linear_attention", "full_attention"] * 16})
