"""The same transfer along axes: what moves, how steeply, and where a rule has no answer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

import mue
from mue.fold import fold
from mue.plan.along import FORWARD, Along, along
from support.plans import make


def axes(plan: mue.Plan) -> dict[str, Along]:
    return {axis.name: axis for axis in along(plan)}


def slopes(axis: Along, of: str) -> dict[str, float]:
    """Exponent of each role's factor over the axis; a straight line on logarithmic axes has one."""
    found = {}
    for curve in axis.curves:
        if curve.of == of:
            steps = [math.log2(b / a) for a, b in zip(curve.factors, curve.factors[1:], strict=False)]
            if max(steps) - min(steps) < 1e-9:
                found |= dict.fromkeys(curve.roles, round(steps[0], 9))
    return found


def test_slopes_are_the_rules_exponents() -> None:
    """README's table: lr s/r, std r^-1/2, weight decay r, head 1/r, residual l^-1, R = a; N enters nothing, batch as s."""
    by = axes(make())
    assert list(by) == ["width", "depth", "active experts", "experts", "batch", "duration"]
    width = by["width"]
    assert slopes(width, "lr")["expert_down"] == -1 and slopes(width, "lr")["embedding"] == 0
    assert slopes(width, "init_std")["attention_q"] == -0.5 and slopes(width, "weight_decay")["router"] == 1
    assert slopes(width, FORWARD) == {"A": 0, "R": 0, "residual": 0, "head": -1}
    assert slopes(by["depth"], FORWARD)["residual"] == -1
    assert slopes(by["active experts"], FORWARD)["R"] == 1
    assert not any(curve.moves for curve in by["experts"].curves)
    assert set(slopes(by["batch"], "lr").values()) == {0.35}


def test_a_point_is_the_plan_of_that_target() -> None:
    """Negative control of all of them: the curve against a plan that is made by hand."""
    width = axes(make())["width"]
    wide = make(target=mue.MoE.parse("16e4a1s", width=1024, expert=256, layers=8))
    for curve in width.curves:
        for role in curve.roles if curve.of != FORWARD else ():
            factor = getattr(wide.roles[role].factor, curve.of)
            assert curve.factors[width.x.index(1024)] == pytest.approx(factor)
    assert width.here == 256 and width.base == 128


def test_a_rule_without_an_answer_says_so() -> None:
    plan = make(rule="mup", target=mue.Dense(256, 256, 8), base_training=None, training=None)
    by = axes(plan)
    assert list(by) == ["width", "depth"] and by["depth"].x == (8,) and "mup" in by["depth"].refused
    assert by["width"].refused == ""


def test_folded_blocks_that_differ_with_values_for_thirds() -> None:
    """Another depth has other thirds, and a folded plan folded neighbours."""
    blocks = (mue.Block(layers=2, ffn=512), mue.Block(layers=4, experts=16, active=2, expert=64, shared_experts=1))
    tuned = mue.HParams(1e-3, 0.1, 0.01, roles={"first_third": {"ffn_up": {"lr_times": 2.0}}})
    plan = fold(make(target=mue.Mixed(256, blocks), tuned=tuned))
    depth = axes(plan)["depth"]
    assert depth.x == (3, 6, 12, 24, 48, 96)
    assert slopes(depth, "init_std")["attention_o"] == -1  # its l^-1 is in the weights
    assert set(slopes(depth, FORWARD).values()) == {0}


def test_measured_moments_are_of_one_router() -> None:
    target = mue.MoE.parse(
        "16e4a", width=256, expert=64, layers=8, normalize=False, gates="measured", gate_moments=(2.0, 1.2)
    )
    assert list(axes(make(target=target))) == ["width", "depth", "batch", "duration"]
    without = make(target=target, base_training=None, training=None)
    assert list(axes(without)) == ["width", "depth"]  # both trainings are given above, hence the last two


def test_a_chain_is_along_the_run_of_its_base() -> None:
    """A target behind a plan has no run of its own: it is the plan's, and its neighbours differ from that one."""
    first = make()
    chain = mue.transfer(first, replace(first.target, width=512))
    assert chain.inputs.training is None and chain.training == first.training
    by = axes(chain)
    assert list(by) == list(axes(first)) and set(slopes(by["batch"], "lr").values()) == {0.35}
    assert (by["width"].here, by["width"].base) == (512, 256) and by["batch"].base == by["batch"].here == 1 << 16
    twice = replace(first.training, batch=1 << 17)
    wide = mue.transfer(first, chain.target, training=twice)
    for curve in by["batch"].curves:
        for role in curve.roles if curve.of != FORWARD else ():
            found = curve.factors[by["batch"].x.index(1 << 17)]
            assert found == pytest.approx(getattr(wide.roles[role].factor, curve.of))


def test_r_is_drawn_where_the_target_has_one_active_expert() -> None:
    """Its own R is 1 there, and that of its neighbours is not; a model without experts has no R."""
    assert (
        slopes(axes(make(target=mue.MoE.parse("16e1a", width=256, expert=64, layers=8)))["active experts"], FORWARD)[
            "R"
        ]
        == 1
    )
    assert "R" not in slopes(axes(make(target=mue.Dense(256, 256, 8)))["width"], FORWARD)
