"""mue.shapes.schedule: experts by depth (2603.01697), their total kept."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mue
from mue.plan.toml import plan_inputs
from mue.plan.transfer import plan_of
from mue.shapes import shape_from_dict
from mue.shapes.schedule import SCHEDULES, layer_schedule


def shape(experts: int = 16, active: int = 4, layers: int = 6, **given_: Any) -> mue.MoE:
    return mue.MoE(64, 32, layers, experts=experts, active=active, head_dim=16, **given_)


def counts(name: str, *arguments: Any, **given_: Any) -> list[int]:
    return [block.experts for block in layer_schedule(shape(*arguments), name, **given_).per_layer]


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    experts=st.integers(1, 200),
    layers=st.integers(1, 40),
    spread=st.floats(0.0, 0.99),
)
def test_the_total_is_kept(name: str, experts: int, layers: int, spread: float) -> None:
    """Exactly; every layer within the spread but for rounding, and with an expert at least."""
    found = counts(name, experts, 1, layers, spread=spread)
    assert sum(found) == experts * layers and min(found) >= 1
    assert all(abs(number - experts) <= spread * experts + 1 + 1e-6 for number in found)


def test_each_has_its_form() -> None:
    down, up = counts("descending"), counts("ascending")
    assert down == up[::-1] and down[0] == 24 and down[-1] == 8 and all(a >= b for a, b in pairwise(down))
    pyramid, inverse = counts("pyramid"), counts("inverse-pyramid")
    assert pyramid == pyramid[::-1] and pyramid[2] > pyramid[1] > pyramid[0]
    assert inverse == inverse[::-1] and inverse[2] < inverse[1] < inverse[0]
    wave = counts("wave", 16, 4, 9)
    assert wave[2] > 16 > wave[6] and wave[0] == wave[4] == wave[8] == 16
    assert counts("uniform") == [16] * 6 == counts("descending", spread=0.0)
    assert len({tuple(c) for c in (down, up, pyramid, inverse)}) == 4


def test_blocks_are_equal_layers_side_by_side_and_all_else_stays() -> None:
    one = shape(shared_experts=2, router="softmax", heads=4, vocab=300, tied=True)
    found = layer_schedule(one, "pyramid")
    assert found.layers == 6 and found.vocab == 300 and found.tied and found.num_heads == 4
    assert all(a.experts != b.experts for a, b in pairwise(found.blocks))
    assert all(b.shared_experts == 2 and b.router == "softmax" and b.active == 4 for b in found.blocks)
    assert shape_from_dict(found.to_dict()) == found
    assert layer_schedule(one, "uniform").blocks == one.blocks


def test_active_ones_stay_or_follow() -> None:
    follow = layer_schedule(shape(), "descending", active="share").per_layer
    assert [(b.experts, b.active) for b in follow][:: len(follow) - 1] == [(24, 6), (8, 2)]
    with pytest.raises(ValueError, match="leaves a layer 8 experts, fewer than 12 active"):
        layer_schedule(shape(active=12), "ascending")
    assert layer_schedule(shape(active=12), "ascending", active="share").per_layer[0].active == 6


FILE: dict[str, Any] = {
    "base": {"width": 32, "ffn": 32, "layers": 4, "head_dim": 16},
    "tuned": {"lr": 0.01, "weight_decay": 0.1, "init_std": 0.1},
    "target": {"width": 64, "moe": "16e2a", "expert": 32, "layers": 4, "head_dim": 16, "schedule": "descending"},
}


def with_target(**given_: Any) -> dict[str, Any]:
    return {**FILE, "target": {**FILE["target"], **given_}}


def test_a_plan_file_names_one() -> None:
    """The plan is layer by layer: of every layer A, R and the down std are those of a plan of that layer's shape alone."""
    plan = plan_of(plan_inputs(with_target(schedule={"name": "descending", "spread": 0.5, "active": "share"})))
    assert [block.experts for block in plan.target.per_layer] == [24, 19, 13, 8]
    for block, planned in zip(plan.target.blocks, plan.blocks, strict=True):
        alone = with_target(moe=f"{block.experts}e{block.active}a")
        del alone["target"]["schedule"]
        (own,) = plan_of(plan_inputs(alone)).blocks
        assert planned.output_multiplier == own.output_multiplier and planned.route_scale == own.route_scale
        assert planned.roles["expert_down"].values == own.roles["expert_down"].values
    assert len({b.output_multiplier for b in plan.blocks}) > 1  # the control


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"schedule": "descendig"}, "unknown schedule 'descendig'; did you mean 'descending'"),
        ({"schedule": {"spread": 0.5}}, "the table schedule of .target. needs 'name'"),
        ({"schedule": {"name": "wave", "spred": 0.5}}, "unknown key 'spred' in the table schedule of .target.; did you mean 'spread'"),
        ({"schedule": {"name": "wave", "spread": 1.0}}, "spread of a schedule must be a number from 0 and below 1, got 1.0"),
        ({"schedule": {"name": "wave", "active": "all"}}, "active of a schedule must be one of same, share"),
        ({"schedule": "wave", "moe": "16e2a2g"}, "a schedule over layers and 2 groups of experts do not go together"),
        ({"schedule": "wave", "moe": "16e2a1p"}, "those of 16e2a1p lie in pools that layers share: leave one of them out"),
        ({"schedule": "wave", "moe": "1s"}, "the shape has none"),
        ({"schedule": "wave", "blocks": []}, r"has moe and \[\[target.blocks\]\]"),
    ],
)  # fmt: skip
def test_refusals(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_inputs(with_target(**given_))
