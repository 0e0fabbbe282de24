"""What rules answer for a diffusion transformer: the worked example's second column, and every role by its class or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import mue
from mue.rules.roles import ROLES
from mue.rules.table import FIELDS, ZERO
from support.sde import SDE

IMAGE = mue.Image(size=32, channels=4, patch=2, classes=1000)
BASE = mue.Dense(width=128, ffn=128, layers=8, image=IMAGE)
TARGET = mue.MoE.parse("128e8a1s", width=1024, expert=1024, layers=8, image=IMAGE)
TUNED = mue.HParams(lr=4.52e-3, weight_decay=0.02, init_std=0.02, eps=1e-8)
RUNS: dict[str, Any] = {
    "base_training": mue.Training(batch=2**16, steps=25_000),
    "training": mue.Training(batch=2**16, steps=100_000),
}
OWN = [name for name, role in ROLES.items() if role.task == "image"]
INPUTS = ("patch_embedding", "time_embedding_in", "class_embedding")
OUTSIDE = ("time_embedding_out", "final_modulation")
six = 2e-6  # six printed digits


@pytest.mark.parametrize(("rule", "decay"), [("complete-mue", 0.08), ("complete-mue-paper", 0.01)])
def test_the_diffusion_column_of_the_worked_example(rule: str, decay: float) -> None:
    """2605.23893: base rate 4.52e-3, decay 0.02, std 0.02; dense d128 to 128e8a1s d1024 in four times the steps."""
    plan = mue.transfer(BASE, TARGET, TUNED, **RUNS, rule=rule, **SDE)
    assert (plan.active_width, plan.route_scale, plan.head_multiplier) == (9216, 8, 1 / 8)
    assert plan.output_multiplier == pytest.approx(1 / 9, rel=1e-12)
    values = {role: planned.values for role, planned in plan.roles.items() if planned.count}
    hidden = {r: v for r, v in values.items() if ROLES[r].hidden or r in OUTSIDE}
    for role, v in hidden.items():
        std = 0.0 if ROLES[role].zero else 0.0212132 if ROLES[role].part == "down" else 0.00707107
        assert (v.lr, v.init_std) == pytest.approx((2.825e-4, std), rel=six), role
        assert v.weight_decay == pytest.approx(decay, rel=six), role
    for role in INPUTS:
        assert (values[role].lr, values[role].init_std) == pytest.approx((2.26e-3, 0.02), rel=six), role
        assert values[role].weight_decay == pytest.approx(0.01, rel=six)
    paper = rule == "complete-mue-paper"
    assert values["head"].lr == pytest.approx(2.825e-4 if paper else 2.26e-3, rel=six)
    assert values["head"].init_std == pytest.approx(0.00707107 if paper else 0.02, rel=six)
    assert values["head"].weight_decay == pytest.approx(0.01, rel=six)


def test_its_folded_numbers() -> None:
    plan = mue.transfer(BASE, TARGET, TUNED, **RUNS, rule="complete-mue-paper", **SDE)
    folded = mue.fold.fold(plan)
    for role, std, lr, decay in (
        ("expert_down", 0.0188562, 2.51111e-4, 0.01125),
        ("shared_down", 0.00235702, 3.13889e-5, 0.09),
        ("head", 8.83883e-4, 3.53125e-5, 0.08),
    ):
        v = folded.roles[role].values
        assert (v.init_std, v.lr, v.weight_decay) == pytest.approx((std, lr, decay), rel=six), role
    assert (
        folded.roles["modulation"].values == plan.roles["modulation"].values
    )  # the branch's multiplier is in o and down


@pytest.mark.parametrize("name", list(mue.RULES))
def test_every_rule_answers_or_says_why_not(name: str) -> None:
    """A row with a source for each role of images, or a reason; a row that is no rule's own is marked as inferred."""
    rule = mue.get_rule(name)
    made = rule.for_roles(ROLES.values())
    for role in OWN:
        if role not in made.rows:
            assert role in rule.unanswered and len(made.why_not(role)) > 40, role
            continue
        row = made.rows[role]
        assert len(row.source) > 10 and (row.init_std == ZERO) == ROLES[role].zero, role
        if role not in rule.rows:
            assert row.mark("lr") in ("inferred", "not given") and ROLES[role].like in row.source
            assert row.lr.exponent("ρ_d") == made.rows[ROLES[role].like or ""].lr.exponent("ρ_d")


def test_a_matrix_outside_the_blocks_has_no_depth() -> None:
    """In complete-mue eps of a hidden weight goes as 1/(ρ_d·ρ_L), and without the second where there is no depth; α = ½ shows in lr."""
    rule = mue.get_rule("complete-mue", depth_exponent=0.5).for_roles(ROLES.values())
    for field in FIELDS:
        inside, outside = (getattr(rule.rows[r], field) for r in ("modulation", "final_modulation"))
        assert outside.exponent("ρ_L") == 0 and outside.exponent("ρ_d") == inside.exponent("ρ_d")
    assert rule.rows["modulation"].lr.exponent("ρ_L") != 0


def test_plans_of_language_models_do_not_name_them() -> None:
    plans = [mue.transfer(replace(BASE, **x), replace(TARGET, **x), TUNED) for x in ({"image": None}, {"image": IMAGE})]
    assert [set(OWN) & set(p.roles) for p in plans] == [set(), set(OWN)]
    assert not set(OWN) & set(plans[0].rule.rows)
    assert "modulation" not in str(plans[0].to_dict())


def test_no_rule_goes_from_text_to_images() -> None:
    with pytest.raises(ValueError, match="target draws images and the base is a language model"):
        mue.transfer(replace(BASE, image=None), TARGET, TUNED)
    with pytest.raises(ValueError, match="base draws images and the target is a language model"):
        mue.transfer(BASE, replace(TARGET, image=None), TUNED)


def test_steps_relative_to_a_weight_do_not_leave_zero() -> None:
    with pytest.raises(ValueError, match="relative to the weight"):
        mue.transfer(BASE, TARGET, TUNED.replace(optimizer="lamb"))
    with pytest.raises(ValueError, match="sphere"):
        mue.transfer(BASE, replace(BASE, layers=16), TUNED.replace(optimizer="hyperball"), rule="hyperp")
