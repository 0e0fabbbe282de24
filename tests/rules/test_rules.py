"""The worked example of Complete-muE (2605.23893), printed numbers to six digits; and what each rule refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import mue
from support.sde import SDE

DOWN, UP = ("expert_down", "shared_down"), ("expert_up", "expert_gate", "shared_up", "shared_gate")
ATTENTION = ("attention_q", "attention_k", "attention_v", "attention_o")
TARGET = mue.MoE.parse("128e8a1s", width=1024, expert=1024, layers=8)
RUNS: dict[str, Any] = {
    "base_training": mue.Training(batch=2**19, steps=25_000),
    "training": mue.Training(batch=2**19, steps=100_000),
}
LM = mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.01, eps=1e-8)
DIFFUSION = mue.HParams(lr=4.52e-3, weight_decay=0.02, init_std=0.02, eps=1e-8)
six = 2e-6  # six printed digits


def example(tuned: mue.HParams = LM, base: mue.Dense | None = None, **options: Any) -> mue.Plan:
    """Its numbers are by the SDE rule, as published."""
    return mue.transfer(base or mue.Dense(width=128, ffn=128, layers=8), TARGET, tuned, **RUNS, **SDE, **options)


@pytest.mark.parametrize(
    ("tuned", "lr", "std", "std_down", "base_lr", "wd_literal", "wd_product"),
    [
        (LM, 6.25e-5, 0.00353553, 0.0106066, 5e-4, 0.05, 0.4),
        (DIFFUSION, 2.825e-4, 0.00707107, 0.0212132, 2.26e-3, 0.01, 0.08),
    ],
)
@pytest.mark.parametrize("rule", ["complete-mue", "complete-mue-paper"])
def test_worked_example(
    rule: str,
    tuned: mue.HParams,
    lr: float,
    std: float,
    std_down: float,
    base_lr: float,
    wd_literal: float,
    wd_product: float,
) -> None:
    p = example(tuned, rule=rule)
    paper = rule == "complete-mue-paper"
    assert p.active_width == 9 * 1024 and p.route_scale == 8 and p.residual_multiplier == 1
    assert p.output_multiplier == pytest.approx(1 / 9, rel=1e-12) and p.head_multiplier == 1 / 8
    for role in (*UP, *ATTENTION, "router", *DOWN):
        v = p.roles[role].values
        assert v.lr == pytest.approx(lr, rel=six), role
        assert v.init_std == pytest.approx(std_down if role in DOWN else std, rel=six), role
        assert v.weight_decay == pytest.approx(wd_literal if paper else wd_product, rel=six), role
        assert p.roles[role].factor.lr == pytest.approx(1 / 16, rel=1e-12)  # 1/8 for width, 1/2 for duration
    head = p.roles["head"].values
    assert head.lr == pytest.approx(lr if paper else base_lr, rel=six)
    assert head.init_std == pytest.approx(std if paper else tuned.init_std, rel=six)
    assert head.weight_decay == pytest.approx(wd_literal, rel=six)
    embedding = p.roles["embedding"].values
    assert (embedding.lr, embedding.init_std) == pytest.approx((base_lr, tuned.init_std), rel=six)
    assert p.betas == pytest.approx((0.975, 0.9875), rel=six)
    assert p.drift == {"sigma0_experts": 2.0, "sigma0_other": 0.5, "up_gate": 3.0}
    if paper:
        assert p.roles["head"].values.eps == pytest.approx(2e-8, rel=six)


def test_worked_example_by_what_was_measured() -> None:
    """Four times the steps move nothing by the defaults: the width's factors alone are left, and betas as tuned."""
    p = mue.transfer(mue.Dense(width=128, ffn=128, layers=8), TARGET, LM, **RUNS)
    by_sde = example()
    for role in (*UP, *ATTENTION, "router", *DOWN):
        v = p.roles[role].values
        assert (v.lr, v.weight_decay) == pytest.approx((1.25e-4, 0.8), rel=six), role
        assert v.init_std == by_sde.roles[role].values.init_std, role
    head = p.roles["head"].values
    assert (head.lr, head.weight_decay, p.betas) == (1e-3, 0.1, LM.betas)
    assert p.output_multiplier == by_sde.output_multiplier and p.route_scale == 8 and p.drift == by_sde.drift
    as_options = mue.transfer(mue.Dense(width=128, ffn=128, layers=8), TARGET, LM, **RUNS, **mue.rules.SDE)
    assert as_options.hash == by_sde.hash != p.hash


@pytest.mark.parametrize("wd_mode", ["constant-product", "none", "sqrt-width"])
@pytest.mark.parametrize("head_mode", ["completep", "paper"])
def test_both_head_and_all_weight_decay_modes_of_the_recommended_rule(head_mode: str, wd_mode: str) -> None:
    """The example, and a value for √width beside the two of the fixture."""
    p = example(head=head_mode, weight_decay_width=wd_mode)
    wd = {"constant-product": 0.4, "none": 0.05, "sqrt-width": 0.05 * 8**0.5}[wd_mode]
    assert p.roles["expert_down"].values.weight_decay == pytest.approx(wd, rel=six)
    assert p.roles["head"].values.lr == pytest.approx(6.25e-5 if head_mode == "paper" else 5e-4, rel=six)
    assert p.roles["head"].values.init_std == pytest.approx(0.00353553 if head_mode == "paper" else 0.01, rel=six)
    assert p.roles["head"].values.weight_decay == pytest.approx(0.05, rel=six)


@pytest.mark.parametrize("rule", ["complete-mue", "complete-mue-paper"])
def test_a_base_of_expansion_four(rule: str) -> None:
    """e* = 4: tuned with A* = d*/H* = 1/4 the target has A = 1/9; a stock base (A* = 1) has A = 4/9; the rest is equal."""
    stock = mue.Dense(width=128, ffn=512, layers=8)
    absolute = example(base=replace(stock, output_multiplier=1 / 4), rule=rule)
    relative = example(base=stock, rule=rule)
    assert absolute.output_multiplier == pytest.approx(1 / 9, rel=1e-12)
    assert relative.output_multiplier == pytest.approx(4 / 9, rel=1e-12)
    for p in (absolute, relative):
        assert p.roles["expert_down"].values.init_std == pytest.approx(0.01 * (9 / 4) ** 0.5 / 8**0.5, rel=1e-12)
        assert p.roles["expert_down"].values.lr == pytest.approx(6.25e-5, rel=1e-12)
        assert p.drift["up_gate"] == pytest.approx(1.5)
    assert absolute.roles == relative.roles
    # Control: the absolute A = d/H_act on a stock base is what goes wrong.
    assert relative.output_multiplier != pytest.approx(1 / 9, rel=1e-3)


def test_half_width_experts() -> None:
    """h = h_s = d/2: H_act/d = 4.5."""
    target = mue.MoE.parse("128e8a1s", width=1024, expert=512, layers=8)
    p = mue.transfer(mue.Dense(width=128, ffn=128, layers=8), target, LM, **RUNS)
    assert p.output_multiplier == pytest.approx(2 / 9, rel=1e-12)
    assert p.roles["expert_down"].values.init_std == pytest.approx(0.0075, rel=1e-12)


def test_depth_follows_completep() -> None:
    target = replace(TARGET, layers=32)
    p = mue.transfer(mue.Dense(width=128, ffn=128, layers=8), target, LM, depth_exponent="1/2")
    assert p.residual_multiplier == pytest.approx(0.5)
    assert p.roles["attention_q"].factor.lr == pytest.approx(1 / 8 / 2)
    assert p.roles["norm"].factor.lr == pytest.approx(1 / 2) and p.roles["final_norm"].factor.lr == 1
    assert p.roles["attention_q"].factor.eps == pytest.approx(1 / 8 / 2)
    one = mue.transfer(mue.Dense(width=128, ffn=128, layers=8), target, LM)
    assert one.residual_multiplier == pytest.approx(0.25) and one.roles["attention_q"].factor.lr == pytest.approx(1 / 8)


def test_measured_gates() -> None:
    """Conventions 9, against its own formulas: R, c and σ_down for m1, m2, with and without shared experts."""
    for shared in ("", "1s"):
        m1, m2, a, h = 0.7, 0.09, 8, 256
        target = mue.MoE.parse(f"64e8a{shared}", width=512, expert=h, layers=8, gates="measured", gate_moments=(m1, m2))
        base = mue.Dense(width=128, ffn=256, layers=8, output_multiplier=0.8)
        p = mue.transfer(base, target, LM)
        R, hs, star = a / m1, h if shared else 0, 0.8 * 2 * 128
        assert p.route_scale == pytest.approx(R)
        c = 0.8 * 2 * 512 / (R * m1 * h + hs)
        assert p.output_multiplier == pytest.approx(c)
        std = 0.01 * (128 / 512) ** 0.5 * 0.8 * (2 * 512) ** 0.5 / (c * (R**2 * m2 * h + hs) ** 0.5)
        assert p.roles["expert_down"].values.init_std == pytest.approx(std)
        assert p.drift["up_gate"] == pytest.approx(std / 0.01 * 2), star
        uniform = mue.transfer(base, mue.MoE.parse(f"64e8a{shared}", width=512, expert=h, layers=8), LM)
        assert p.roles["expert_down"].values.init_std != uniform.roles["expert_down"].values.init_std


def test_gate_variance_is_one_for_uniform_and_a_for_one_hot_weights() -> None:
    """19: F from the moments."""
    uniform = mue.Block(layers=1, expert=8, experts=8, active=4, gates="measured", gate_moments=(1.0, 0.25))
    one_hot = mue.Block(layers=1, expert=8, experts=8, active=4, gates="measured", gate_moments=(1.0, 1.0))
    assert uniform.gate_variance == pytest.approx(1) and one_hot.gate_variance == pytest.approx(4)


def test_rules_and_options_are_found_or_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'complete-mue'"):
        mue.get_rule("complete_mue")
    with pytest.raises(ValueError, match="'standard' has no option depth_exponent: it has none"):
        mue.get_rule("standard", depth_exponent=1)
    with pytest.raises(ValueError, match="'mup' has no option head"):
        mue.get_rule("mup", head="paper")
    with pytest.raises(ValueError, match=r"depth_exponent must be a number in \[1/2, 1\]"):
        mue.get_rule("complete-mue", depth_exponent=0.4)
    with pytest.raises(ValueError, match="weight_decay_width must be one of"):
        mue.get_rule("complete-mue", weight_decay_width="linear")
    with pytest.raises(ValueError, match="up_gate_correction must be true or false"):
        mue.get_rule("complete-mue", up_gate_correction="yes")
    with pytest.raises(ValueError, match="unknown option 'heads'; did you mean 'head'"):
        mue.get_rule("complete-mue", heads="paper")
    assert mue.get_rule("complete-mue", depth_exponent=0.5) == mue.get_rule("complete-mue", depth_exponent="1/2")
