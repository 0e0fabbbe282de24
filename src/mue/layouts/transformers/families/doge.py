"""Doge: dense by default."""

from __future__ import annotations

from mue.layouts.transformers.family import FAMILIES, Family


@FAMILIES.register("doge")
def doge() -> Family:
    return Family(defaults={"is_moe": True, "num_experts": 64})
