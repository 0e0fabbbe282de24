"""GPT-Neo: its softmax sees q·k as it is, which nothing in the config says."""

from __future__ import annotations

from mue.layouts.transformers.family import FAMILIES, Family


@FAMILIES.register("gpt_neo")
def gpt_neo() -> Family:
    return Family(attention_scale=1.0)
