"""Transfer: a plan as base, conventions of the base, fan-ins, bases it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

import mue
from support.plans import BASE, RUNS, TARGET, TUNED, make


def test_a_plan_as_base_brings_its_own_values() -> None:
    p = make()
    for change in ({"tuned": TUNED}, {"base_training": RUNS["training"]}, {"convention": mue.Convention("1/d")}):
        with pytest.raises(ValueError, match="leave them out"):
            mue.transfer(p, TARGET, change.get("tuned"), **{k: v for k, v in change.items() if k != "tuned"})
    alone = mue.transfer(BASE, TARGET, TUNED)
    with pytest.raises(ValueError, match="the base plan has none"):
        mue.transfer(alone, TARGET, training=RUNS["training"])
    with pytest.raises(ValueError, match="tuned is missing"):
        mue.transfer(BASE, TARGET)
    mixed = mue.Mixed(256, (mue.Block(layers=1, ffn=64), mue.Block(layers=1, ffn=128)))
    with pytest.raises(ValueError, match="blocks differ"):
        mue.transfer(mue.transfer(BASE, mixed, TUNED), TARGET)
    with pytest.raises(ValueError, match="no single e"):
        mue.transfer(mixed, TARGET, TUNED)


def test_conventions_of_the_base() -> None:
    stock = make()
    independent = make(tuned=TUNED.replace(weight_decay=1e-4), convention=mue.Convention(weight_decay="independent"))
    assert independent.roles["head"].values.weight_decay == stock.roles["head"].values.weight_decay
    scaled = make(convention=mue.Convention(depth_scaled_init=True))
    for role in ("attention_o", "expert_down", "attention_q"):
        ratio = scaled.roles[role].values.init_std / stock.roles[role].values.init_std  # type: ignore[operator]
        assert ratio == pytest.approx(1 if role == "attention_q" else 0.25)
    assert make(convention=mue.Convention(attention_scale=0.3)).attention_scale == 0.3
    assert stock.attention_scale == 64**-0.5
    other_heads = make(target=replace(TARGET, head_dim=32), convention=mue.Convention("1/d"))
    assert other_heads.attention_scale == pytest.approx(1 / 32)  # (1/64)·(64/32)
    assert make(target=replace(TARGET, head_dim=32)).attention_scale == pytest.approx(64**-0.5 * 2)


def test_a_matrix_whose_fan_in_is_not_the_width_uses_its_own_ratio() -> None:
    """Conventions 8: o_proj reads heads·head_dim."""
    target = replace(TARGET, head_dim=32, heads=4)
    p = mue.transfer(BASE, target, TUNED)
    assert p.roles["attention_o"].factor.lr == 1 and p.roles["attention_q"].factor.lr == 0.5


PLANNING = """
import mue
base = mue.Dense(width=128, ffn=128, layers=8)
target = mue.MoE.parse("256e8a1s", width=4096, expert=2048, layers=128)
plan = mue.transfer(base, target, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.01))
str(plan), plan.to_dict()
"""


def test_planning_imports_no_torch() -> None:
    def imported(code: str) -> set[str]:
        run = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
        )
        return {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if "import time" in line}

    found = imported(PLANNING)
    assert "mue.plan.plan" in found and not {m for m in found if m.split(".")[0] in ("torch", "numpy")}
    assert "torch" in imported("import mue\nmue.Layout")  # control: the layout of a model does need it


def test_a_base_with_experts_says_which_route_scale_it_stands_for() -> None:
    base = mue.MoE.parse("16e4a", width=128, expert=64, layers=8)
    assert any("tuned with R = 4" in note for note in make(base=base).notes)
    assert not make(base=base, rule="standard").notes
    chain = mue.transfer(make(), TARGET)  # a plan says itself what it is
    assert not any("R = 4" in note for note in chain.notes)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (mue.Block(layers=1, ffn=512), "active width"),
        (mue.Block(layers=1, ffn=256), "width of one expert"),
        (mue.Block(layers=1, expert=64, experts=16, active=4), "number of experts"),
    ],
)
def test_a_base_whose_blocks_differ_is_refused(other: mue.Block, what: str) -> None:
    first = mue.Block(layers=1, expert=64, experts=8, active=4)
    mue.transfer(mue.Mixed(256, (first, first)), TARGET, TUNED)
    with pytest.raises(ValueError, match=f"differ in their {what}.*no single e"):
        mue.transfer(mue.Mixed(256, (first, other)), TARGET, TUNED)
