"""Muon's rate in the user's convention: the same step from a plan in each, and plans that compose."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mue
from mue.fold import fold
from mue.plan.explain import why
from mue.plan.update_scale import matrix_shape
from mue.rules.optimizers import of_tuned
from mue.rules.roles import ROLES
from mue.shapes.update_scales import UPDATE_SCALES, converted
from support import rule_properties as properties
from support.optimizer_plans import few

TUNED = mue.HParams(lr=0.02, weight_decay=0.1, init_std=0.02, optimizer="muon", adamw_lr=3e-3)
BASE = mue.Dense(width=128, ffn=256, layers=4, heads=4, kv_heads=2)
TARGETS = (
    mue.Dense(width=384, ffn=1000, layers=6, heads=12, kv_heads=6),
    mue.MoE.parse("16e4a", width=256, expert=64, layers=8, heads=8, kv_heads=4),
    mue.MoE.parse("64e8a2s", width=512, expert=32, shared=96, layers=4, heads=8, kv_heads=4),
)
scales = st.sampled_from(list(UPDATE_SCALES))


def in_spectral(plan: mue.Plan, role: str) -> tuple[float, float]:
    values = plan.roles[role].values
    shape = matrix_shape(ROLES[role], plan.target, plan.target.blocks[0])
    assert values.lr is not None and values.weight_decay is not None
    return converted(values.lr, values.weight_decay, plan.tuned.update_scale, "spectral", *shape)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", list(UPDATE_SCALES))
def test_the_step_does_not_know_the_convention(target: Any, scale: str) -> None:
    """A base tuned in a convention, role by role the same steps as in the spectral one: the target's are the same, too."""
    roles = {}
    for role in ("attention_q", "attention_k", "attention_v", "attention_o", "ffn_up", "ffn_gate", "ffn_down"):
        shape = matrix_shape(ROLES[role], BASE, BASE.blocks[0])
        roles[role] = dict(zip(("lr", "weight_decay"), converted(0.02, 0.1, "spectral", scale, *shape), strict=True))
    spectral = mue.transfer(BASE, target, TUNED)
    other = mue.transfer(BASE, target, TUNED.replace(update_scale=scale, roles=roles))
    for role in (r for r, p in spectral.roles.items() if p.count and of_tuned(TUNED, r) == "muon"):
        assert in_spectral(other, role) == pytest.approx(in_spectral(spectral, role), rel=1e-12), role
        assert why(other, role)  # whose steps have to give the plan's numbers
    if scale != "spectral":
        assert other.roles["attention_k"].values.lr != pytest.approx(spectral.roles["attention_k"].values.lr)


@few
@given(scales, st.permutations(TARGETS))
def test_plans_compose(scale: str, order: list[Any]) -> None:
    tuned = TUNED.replace(update_scale=scale)
    one, two, _ = order
    properties.same(mue.transfer(mue.transfer(BASE, one, tuned), two), mue.transfer(BASE, two, tuned), 1e-11)


@few
@given(scales, st.integers(-6, 6), st.sampled_from(TARGETS))
def test_folding_and_transfer_commute_for_muon(scale: str, power: int, target: Any) -> None:
    """Fold a base used with A* = 2^k and go on from a stock one, or the other way round: not a bit differs."""
    star = 2.0**power
    tuned = TUNED.replace(update_scale=scale)
    base = mue.Dense(**{**BASE.__dict__, "output_multiplier": star})
    direct = fold(mue.transfer(base, target, tuned))
    folded = {"init_std": 0.02 * star, "lr": 0.02 * star, "weight_decay": 0.1 / star}
    stock = fold(mue.transfer(BASE, target, tuned.replace(roles={"ffn_down": folded})))
    for role, planned in direct.roles.items():
        assert not planned.count or planned.values == stock.roles[role].values, role
    if star != 1:  # control: a folded base that keeps its rates is another training
        kept = fold(mue.transfer(BASE, target, tuned)).roles
        down = "ffn_down" if kept["ffn_down"].count else "expert_down"
        assert kept[down].values.lr != direct.roles[down].values.lr


# ---- published settings ---------------------------------------------------------------------------------------------------

MOONLIGHT = mue.HParams(  # MoonshotAI/Moonlight, examples/toy_train.py: Muon(lr=1e-3, wd=0.1, ...), adjust_lr_for_muon
    lr=1e-3, weight_decay=0.1, init_std=0.02, betas=(0.9, 0.95), eps=1e-8, optimizer="muon", momentum=0.95,
    update_scale="match-rms",
)  # fmt: skip
MARIN = mue.HParams(  # marin, experiments/optimizer_sweep, PhaseII/tex/hyperparam_tables_muon.tex: 300m on 2x Chinchilla data
    lr=0.008, adamw_lr=0.0024, weight_decay=0.1, init_std=0.02, betas=(0.8, 0.98), eps=1e-15, optimizer="muon",
    momentum=0.98, clip=1.0, update_scale="keller",
)  # fmt: skip


def test_moonlights_settings_from_a_plan() -> None:
    """At its own shape: one lr and one wd for all, 0.2·√max(out, in) on matrices; AdamW for the rest."""
    plan = mue.transfer(TARGETS[1], TARGETS[1], MOONLIGHT)
    for role, planned in plan.roles.items():
        if planned.count and ROLES[role].trained:
            assert planned.values.lr == 1e-3 and planned.values.weight_decay in (0.1, 0.0), role
    assert plan.momentum == 0.95 and plan.betas == (0.9, 0.95)
    # a wider one keeps operator norms, and so has another RMS: the published convention is not width-independent
    wider = mue.transfer(BASE, TARGETS[0], MOONLIGHT)
    assert wider.roles["attention_q"].values.lr == pytest.approx(1e-3 * (128 / 384) ** 0.5)


def test_marins_settings_from_a_plan() -> None:
    plan = mue.transfer(BASE, BASE, MARIN)
    for role, planned in plan.roles.items():
        if planned.count and ROLES[role].trained:
            assert planned.values.lr == (0.008 if of_tuned(MARIN, role) == "muon" else 0.0024), role
    assert plan.momentum == 0.98 and plan.roles["embedding"].values.weight_decay == 0.1
    wider = mue.transfer(
        BASE, TARGETS[0], MARIN
    )  # Keller's scale of a square matrix knows no width, as the spectral one
    assert wider.roles["attention_q"].values.lr == 0.008 and wider.roles["attention_o"].values.lr == 0.008
