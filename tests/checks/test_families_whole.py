"""Families whose blocks are built in other ways than a stack of additions: right, all is measured; wrong, it is named."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="model families need the hf extra")

import mue
from mue.fold import fold

FORWARD = ("multipliers", "attention scale", "gates")
FAMILIES = {
    "gpt2": "learned positions",
    "gpt_neox": "parallel",
    "gptj": "parallel",
    "phi": "parallel",
    "falcon": "parallel, in place",
    "cohere": "parallel, one after the other",
    "bloom": "a norm after the embedding, positions in the scores",
    "gemma2": "sandwich norms, softcapped, embedding times the root of the width",
    "olmo2": "norms after a branch, none before",
    "flex_olmo": "the same, with experts",
    "glm4": "sandwich norms",
    "afmoe": "the same, with experts",
    "qwen2_moe": "a gate on the shared experts",
    "bitnet": "a norm inside the feed-forward",
    "apertus": "an activation with parameters of its own",
}
# BLOOM's module adds the stream itself, so that a factor on what it returns is one on the stream.
WHERE = {"bloom": "residual stream"}
_known: dict[str, tuple[Any, mue.Plan]] = {}


def family(name: str) -> tuple[mue.Plan, nn.Module, dict[str, torch.Tensor]]:
    """A right tiny model of a family, its folded plan and a batch."""
    from mue.layouts.inspect import inspect
    from mue.layouts.transformers.configs import build, default_config
    from mue.layouts.transformers.family import family_of
    from mue.layouts.transformers.tiny import shrink

    if name not in _known:
        config = shrink(default_config(name), 2, family_of(name).tiny)
        if hasattr(config, "norm_topk_prob"):
            config.norm_topk_prob = True
        found = inspect(config)
        for factor in found.scalings:
            if factor.active:
                setattr(config, factor.attribute, factor.neutral)
        shape = found.shape
        assert shape is not None
        base = mue.Dense(width=32, ffn=64, layers=1, head_dim=16, vocab=shape.vocab, tied=shape.tied)
        _known[name] = config, fold(mue.transfer(base, shape, mue.HParams(lr=4e-3, weight_decay=0.1, init_std=0.05)))
    config, plan = _known[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = build(copy.deepcopy(config))
    plan.init_(model)
    x = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    return plan, model, {"input_ids": x, "labels": x}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_right_models_are_measured_whole(name: str, autocast: bool) -> None:
    plan, model, batch = family(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = mue.check(model, plan, batch, raises=False, only=FORWARD)
    assert found.ok, found
    assert next(f for f in found.findings if f.check == "multipliers" and f.status == "pass").count >= 8, found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_multiplier_on_a_feed_forward_is_named(name: str) -> None:
    plan, model, batch = family(name)
    for path, module in model.named_modules():
        if re.search(r"\.\d+\.mlp$", path):
            module.register_forward_hook(quarter)
    found = mue.check(model, plan, batch, raises=False, only=FORWARD)
    assert any(
        "0.25 of it" in f.measured and re.search(WHERE.get(name, r"mlp|down|fc_out"), f.where) for f in found.failures
    ), found


def quarter(module: nn.Module, given: Any, out: Any) -> Any:
    return (out[0] * 0.25, *out[1:]) if isinstance(out, tuple) else out * 0.25
