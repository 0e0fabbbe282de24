"""Qwen4: its default config leaves the sizes of the sparse attention's indexer open; the multimodal one nests the same."""

from __future__ import annotations

from mue.layouts.transformers.family import FAMILIES, Family

_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "output_gate_type": "sigmoid",
}


@FAMILIES.register("qwen4_exp_text")
def qwen4_exp_text() -> Family:
    return Family(defaults=_INDEXER)


@FAMILIES.register("qwen4_exp")
def qwen4_exp() -> Family:
    return Family(defaults={"text_config": _INDEXER})
