"""A MoE as users write theirs: right, all is measured, in any precision; wrong, it is named, though it returns its loss alone."""

from __future__ import annotations

import re

import pytest
import torch

import mue
from support.moe_structures import moe_structure

FORWARD = ("multipliers", "attention scale", "gates")
STRUCTURES = [
    (),
    ("parallel",),
    ("ends",),
    ("lists", "bias"),
    ("before",),
    ("shared gate",),
    ("parallel", "ends", "lists"),
]
WRONG = {
    "R": r"routed sum of blocks.0.(w2|experts.0.w2)",
    "A": r"(routed sum|shared experts) of",
    "shared": r"shared experts of blocks.0.down",
    "residual": r"branch|routed sum|shared experts",
    "head": r"loss of head.weight",
    "scale": r"blocks.0.qkv.weight",
}


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("options", STRUCTURES, ids=" ".join)
def test_right_models_are_measured_whole(options: tuple[str, ...], precision: str) -> None:
    plan, model, batch = moe_structure(*options)
    if precision == "bf16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        found = mue.check(model, plan, batch, raises=False, only=FORWARD)
    assert found.ok and not found.warnings, found


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("options", STRUCTURES, ids=" ".join)
def test_wrong_multipliers_are_named(options: tuple[str, ...], wrong: str) -> None:
    plan, model, batch = moe_structure(*options, **{wrong: 2.0})
    found = mue.check(model, plan, batch, raises=False, only=FORWARD)
    assert any(re.search(WRONG[wrong], f.where) for f in found.failures) and not found.unmeasured, found


def test_experts_with_biases_are_computed_with_them() -> None:
    plan, model, batch = moe_structure("lists", "bias")
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, 0, 0.05)
    assert mue.check(model, plan, batch, only=FORWARD).ok
