"""Experts that layers share: a right model passes every check, and what is wrong with it is named, in the layer where it is."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import mue
from mue.fold import fold
from mue.lab.models.language import LanguageModel

BASE = mue.Dense(width=32, ffn=32, layers=2, head_dim=16, sequence=32)
TARGET = mue.MoE.parse("8e2a1s2p", width=32, expert=16, layers=4, head_dim=16, sequence=32)
TUNED = mue.HParams(lr=8e-3, weight_decay=0.1, init_std=0.1)
TOKENS = torch.randint(256, (2, 2, 32), generator=torch.Generator().manual_seed(0)).unbind(0)


def built(folded: bool = False) -> tuple[mue.Plan, LanguageModel]:
    plan = mue.transfer(BASE, TARGET, TUNED)
    plan = fold(plan) if folded else plan
    model = LanguageModel(plan.target, plan.multipliers)
    plan.init_(model, seed=4)
    return plan, model


def failures(plan: mue.Plan, model: LanguageModel) -> dict[str, str]:
    optimizer = torch.optim.AdamW(plan.param_groups(model))
    found = mue.check(model, plan, TOKENS, optimizer, raises=False)
    return {f.check: f.where for f in found.findings if f.status == "fail"}


@pytest.mark.parametrize("folded", [False, True])
def test_a_right_model_is_measured_whole(folded: bool) -> None:
    plan, model = built(folded)
    found = mue.check(model, plan, TOKENS, torch.optim.AdamW(plan.param_groups(model)))
    assert not found.warnings and not found.unmeasured, found
    assert {f.check for f in found.findings if f.status == "pass"} >= {
        "coverage",
        "init",
        "multipliers",
        "gates",
        "moved",
    }


@pytest.mark.parametrize("layer", range(4))
def test_a_wrong_multiplier_is_named_in_the_layer_that_reads_the_pool(layer: int) -> None:
    plan, model = built()
    model.blocks[layer].moe.output_multiplier *= 1.5  # type: ignore[union-attr]
    found = mue.check(model, plan, TOKENS, raises=False, only=("multipliers",)).failures
    assert {f.where for f in found if "routed" not in f.where} == {f"shared experts of blocks.{layer}.moe.shared_down"}
    assert any(f"pools.{layer // 2}.down" in f.where for f in found), found


def test_a_layer_that_reads_other_experts_than_declared_is_named() -> None:
    plan, model = built()
    model.blocks[1].moe.__dict__["pool"] = model.pools[1]
    found = mue.check(model, plan, TOKENS, raises=False, only=("multipliers",))
    assert {f.where for f in found.unmeasured} == {"blocks 1 feed-forward"}, found


def test_a_layer_that_reads_a_copy_of_its_pool_is_named() -> None:
    """Beside shared experts: the copy computes the same, but no optimizer knows it."""
    plan, model = built()
    model.blocks[3].moe.__dict__["pool"] = copy.deepcopy(model.pools[1])
    (found,) = mue.check(model, plan, TOKENS, raises=False, only=("multipliers",)).failures
    assert found.where == "pools.1.down" and "layer 3 computes with other weights" in found.measured


def test_a_pool_that_no_token_comes_to_is_idle_and_another_is_not() -> None:
    plan, model = built()
    right = mue.check(model, plan, TOKENS, torch.optim.AdamW(plan.param_groups(model)), only=("moved",))
    assert right.ok
    first, second = (block.moe.router.balance_bias for block in model.blocks[2:])  # type: ignore[union-attr]
    for idle in (
        0,
        4,
        6,
    ):  # of the second pool: its two layers send every token to the first two experts, to other ones, or to all
        first.zero_()
        second.zero_()
        first[:2] = second[2:4] = 10.0 if idle == 4 else 0.0
        if idle == 6:
            first[:2] = second[:2] = 10.0
        (found,) = mue.check(model, plan, TOKENS, torch.optim.AdamW(plan.param_groups(model)), only=("moved",)).findings
        assert (f"{idle} experts" in found.measured) == (idle > 0), found
    with torch.no_grad():
        model.pools[0].up.requires_grad_(False)
    assert "coverage" in failures(plan, model)


def test_exports_say_where_pools_lie_or_refuse_them() -> None:
    plan, model = built()
    text = plan.export("torch")
    assert r"pools\.0\.down" in text and r"moe\.experts" not in text
    names = [name for name, _ in model.named_parameters() if "pools" in name]
    assert all(name.replace(".", r"\.") in text for name in names)
    soft = mue.transfer(BASE, replace(TARGET, router="softmax"), TUNED)
    for stack in ("megatron", "torchtitan", "olmo-core"):
        with pytest.raises(ValueError, match="has experts of its own in every layer, and those of 8e2a1s2p"):
            soft.export(stack)
    with pytest.raises(ValueError, match=r"experts.* read by layer 0, planned for layers 0–1"):
        mue.transfer(BASE, replace(TARGET, router="softmax", shared_experts=0), TUNED).export("transformers")


def test_the_plan_says_what_sharing_does() -> None:
    plan, own = (mue.transfer(BASE, replace(TARGET, pools=n), TUNED) for n in (2, 0))
    assert plan.roles["expert_up"].count == 16 and own.roles["expert_up"].count == 32
    for role in plan.roles:  # lr, weight decay and init do not follow the share
        assert plan.roles[role].values == own.roles[role].values
    assert plan.drift["sigma0_experts"] == pytest.approx(own.drift["sigma0_experts"] / 2**0.5)  # type: ignore[operator]
    (note,) = [note for note in plan.notes if "pool" in note]
    assert "2·a/N = 0.5 visits per token" in note and "σ0 of their steps is × 1.414" in note
    assert not [note for note in own.notes if "pool" in note]
    assert plan.hash != own.hash
