"""mue.plan.gates: routers whose weights are raw scores are told how far apart their logits are at init."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mue
from mue.lab.models.language import LanguageModel
from mue.moe import gate_moments
from mue.plan.explain import why
from mue.plan.replan import load, retuned
from mue.shapes import Block, Mixed

BASE = mue.Dense(width=64, ffn=64, layers=2, head_dim=16, sequence=32)
TUNED = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.05)
RAW = (("switch", "8e1a"), ("switch", "16e2a"), ("expert-choice", "16e2a"))


def shape(router: str, notation: str, width: int = 64, **settings: object) -> mue.MoE:
    return mue.MoE.parse(
        notation, width=width, expert=32, layers=2, head_dim=16, sequence=32, router=router, router_settings=settings
    )


@pytest.mark.parametrize(("router", "notation"), RAW)
def test_r_is_for_the_logits_that_the_plan_draws(router: str, notation: str) -> None:
    """σ√d with the σ of the plan's router, at every width the same; R·E[Σw] = a (docs/why/index.md#gates)."""
    found = []
    for width in (64, 256):
        plan = mue.transfer(BASE, shape(router, notation, width), TUNED)
        block, std = plan.target.blocks[0], plan.roles["router"].values.init_std
        assert std is not None and block.all_settings["logit_std"] == pytest.approx(std * math.sqrt(width))
        assert block.moments is not None
        assert plan.route_scale == pytest.approx(block.active / block.moments[0])
        found.append(plan.route_scale)
        assert f"{router} gates: F = " in " ".join(plan.notes)
        assert "R = ā/m1" not in " ".join(mue.transfer(BASE, shape("quantile", notation, width), TUNED).notes)
    assert found[0] == pytest.approx(found[1])
    tight = mue.transfer(BASE, shape(router, notation), replace(TUNED, init_std=1e-6))
    even = 2 if (router, notation) == ("switch", "16e2a") else plan.target.blocks[0].experts
    assert tight.route_scale == pytest.approx(even, rel=1e-3)
    assert abs(found[0] / tight.route_scale - 1) > 0.03  # control: nothing would change if nobody told them


@pytest.mark.parametrize(("router", "notation"), RAW)
def test_the_model_has_the_moments_that_were_planned(router: str, notation: str) -> None:
    """Of a drawn model on random tokens; within 15 %, where moments of even logits would be off by more than that."""
    settings = {"capacity": 16.0, "random_second": False} if router == "switch" else {}
    plan = mue.transfer(BASE, shape(router, notation, **settings), TUNED)
    found = []
    for seed in range(3):
        model = LanguageModel(plan.target, plan.multipliers, seed=seed)
        plan.init_(model, seed)
        found += [gate_moments(r)[0] for r in model(torch.randint(256, (16, 32))).routings]
    measured, planned = sum(found) / len(found), plan.target.blocks[0].moments
    assert planned is not None and measured == pytest.approx(planned[0], rel=0.15)
    even = plan.target.blocks[0].router_kind.moments(  # type: ignore[misc]
        plan.target.blocks[0].active, plan.target.blocks[0].experts, {"logit_std": 0.0, "random_second": False}
    )
    if notation != "16e2a" or router != "switch":  # whose two weights are renormalised
        assert measured != pytest.approx(even[0], rel=0.15)


def test_what_a_user_says_stays_and_files_keep_what_a_plan_follows_from(tmp_path: Path) -> None:
    plan = mue.transfer(BASE, shape("switch", "8e1a", logit_std=0.25), TUNED)
    assert plan.target.blocks[0].all_settings["logit_std"] == 0.25
    told = mue.transfer(BASE, shape("switch", "8e1a"), TUNED)
    assert "logit_std" not in json.dumps(
        told.inputs.to_dict()
    )  # it follows from the inputs, and other ones give another
    told.save(tmp_path / "plan.json")
    assert load(tmp_path / "plan.json").hash == told.hash != plan.hash
    wider = retuned(told, init_std=0.1)  # as a sweep does
    assert wider.target.blocks[0].all_settings["logit_std"] == pytest.approx(0.8)
    assert wider.hash == mue.transfer(BASE, shape("switch", "8e1a"), replace(TUNED, init_std=0.1)).hash


def test_of_two_stds_each_is_told_that_nobody_said() -> None:
    """Of logits, and of an expert's logits over the patches of an image."""
    image = mue.Image(size=8, channels=1, patch=2, classes=3)
    base = mue.Dense(width=64, ffn=64, layers=2, head_dim=16, image=image)

    def stds(**given: float) -> tuple[float, float, float]:
        settings = {"within": "sequence", **given}
        moe = mue.MoE.parse("8e2a", width=64, expert=32, layers=2, head_dim=16, image=image, router="expert-choice", router_settings=settings)  # fmt: skip
        plan = mue.transfer(base, moe, TUNED)
        found = plan.target.blocks[0].all_settings
        return found["logit_std"], found["token_std"], plan.route_scale

    logit, token, scale = stds()
    assert 0 < token < 0.9 * logit
    assert stds(token_std=0.5)[:2] == (pytest.approx(logit), 0.5)
    assert stds(logit_std=2 * logit)[:2] == pytest.approx((2 * logit, 2 * token))
    assert stds(logit_std=0.3, token_std=0.2)[:2] == (0.3, 0.2)
    assert stds(logit_std=logit) == pytest.approx((logit, token, scale))
    assert stds(token_std=0.5)[2] < 0.9 * scale  # control: R hears it


def test_the_explanation_and_a_base_with_such_a_router_agree() -> None:
    plan = mue.transfer(BASE, shape("switch", "8e1a"), TUNED)
    assert "switch router's gates, absolute" in why(plan, "route_scale")[0].text
    same = mue.transfer(shape("expert-choice", "16e2a"), shape("expert-choice", "16e2a"), TUNED)
    assert same.roles["expert_down"].factor.init_std == 1 and same.output_multiplier == 1
    chained = mue.transfer(plan, shape("switch", "8e1a", 128))
    assert chained.route_scale == pytest.approx(plan.route_scale)


def test_each_block_of_a_mixed_shape_is_told() -> None:
    blocks = (
        Block(layers=1, ffn=64),
        Block(layers=1, experts=8, active=1, expert=32, router="switch"),
        Block(layers=1, experts=8, active=2, expert=32),
    )
    plan = mue.transfer(BASE, Mixed(width=64, blocks=blocks, head_dim=16, sequence=32), TUNED)
    told = [block.router_settings.get("logit_std") for block in plan.target.blocks]
    assert told == [None, pytest.approx(0.05 * 8), None]


@pytest.mark.parametrize(("router", "notation"), [("switch", "8e1a"), ("switch", "32e1a"), ("expert-choice", "32e2a")])
def test_the_branch_starts_as_large_as_the_dense_one(router: str, notation: str) -> None:
    """A and R together, within a tenth. With the moments of even logits it would be two to four times as large."""
    ratios = []
    for told in ({}, {"logit_std": 1e-9}):
        settings = {**told, "capacity": 64.0} if router == "switch" else told
        moe = mue.MoE.parse(
            notation, width=64, expert=64, layers=2, head_dim=16, sequence=32, router=router, router_settings=settings
        )
        found = []
        for target in (moe, BASE):
            plan, sizes = mue.transfer(BASE, target, TUNED.replace(init_std=0.08)), []
            for seed in range(3):
                model = LanguageModel(plan.target, plan.multipliers, seed=seed)
                plan.init_(model, seed)
                block, x_BTD = model.blocks[0], torch.randn(32, 32, 64)
                with torch.no_grad():
                    y_BTD = block.ffn(x_BTD) if block.ffn is not None else block.moe(x_BTD)[0]  # type: ignore[operator,union-attr]
                sizes.append(float(y_BTD.square().mean().sqrt()))
            found.append(sum(sizes))
        ratios.append(found[0] / found[1])
    assert ratios[0] == pytest.approx(1, abs=0.1)
    assert ratios[1] > 1.8
