"""What rules and laws say of a change, and what being wrong costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from public import slopes, steplaw
from public.cells import cells_of
from public.laws import LAWS, RULES, folded_change, power, rule_change
from public.score import cheapest, scenarios, score, upward

from .conftest import CURVATURE


@pytest.fixture
def cells(made_up, monkeypatch):
    monkeypatch.setattr(slopes, "RESAMPLES", 80)
    return {
        kind: cells_of(steplaw.read(kind, *made_up(kind, lambda x: -10 + 0.5 * (x["B"] - 17))))[0]
        for kind in ("moe", "dense")
    }


def test_our_rules_are_asked(cells):
    base = cells["dense"][0]
    longer = replace(base, tokens=base.tokens * 4)
    larger = replace(longer, batch=base.batch * 4)
    wider = next(c for c in cells["dense"] if c.shape.width == 2 * base.shape.width and c.batch == base.batch)
    said = {rule: [rule_change(rule, base, t)["attention_q"] for t in (longer, larger, wider)] for rule in RULES}
    assert said["complete-mue"] == said["complete-mue-paper"] == pytest.approx([-1, 0, -1], abs=1e-4)  # steps are whole
    assert said["hidden-ratio-only"] == pytest.approx([0, 0, -1]) and said["standard"] == [0, 0, 0]
    assert rule_change("complete-mue", base, wider)["embedding"] == pytest.approx(0)
    assert power(0.5, 0.5).change(base, wider) == pytest.approx(-1)
    assert power(0.35, 0.25).change(base, larger) == pytest.approx(0.7 - 0.5)


def test_folded_the_rule_differs_between_matrices(cells):
    few, many = (next(c.shape for c in cells["moe"] if c.shape.name == name) for name in ("1in8", "2in8"))
    folded = folded_change("complete-mue", few, many)  # e × 1.5, a × 2: A·R = 4/3 on routed experts, A = 2/3 on shared
    assert folded["expert_up"] == 0
    assert 2 ** folded["expert_down"] == pytest.approx(4 / 3) and 2 ** folded["shared_down"] == pytest.approx(2 / 3)


def test_a_law_reads_its_own_quantities(cells):
    base, target = (
        cells["moe"][0],
        replace(cells["moe"][-1], tokens=cells["moe"][0].tokens, batch=cells["moe"][0].batch),
    )
    said = {law.name: law.change(base, target) for law in LAWS}  # twice the active parameters, all else the same
    assert said["Step Law"] == 0 and said["Step Law by active N"] == pytest.approx(-0.713)
    assert said["Ludziejewski et al."] == pytest.approx(-0.81) and said["nmoe"] == pytest.approx(-0.17)
    assert said["Ling"] == pytest.approx(-0.1529)
    assert all(len(law.source) > 20 for law in LAWS)


def test_a_right_law_costs_nothing_and_an_octave_costs_half_the_curvature(cells):
    pairs = scenarios(cells["moe"], cells["dense"])
    batch = score([(b, t) for b, t in pairs["dense: larger batch, tokens fixed"] if t.batch == 4 * b.batch])
    right, none = batch["laws"]["complete-mue, p = 0.5, q = 0"], batch["laws"]["standard"]
    assert batch["moved"] == pytest.approx(1, abs=1e-3) and right["cost"] < 1e-6 and abs(right["error"]) < 1e-3
    assert none["error"] == pytest.approx(-1, abs=1e-3) and none["cost"] == pytest.approx(CURVATURE / 2, rel=1e-2)
    tokens = score(pairs["dense: more tokens, batch fixed"])["laws"]
    assert tokens["standard"]["cost"] < 1e-6 < tokens["complete-mue"]["cost"]
    assert all(pairs.values())  # no scenario without a pair


def test_the_cheapest_exponents_are_those_put_in(cells):
    found = cheapest(upward(cells["dense"]))
    assert (found["p"], found["q"]) == ({"value": 0.5, "interval": [0.5, 0.5]}, {"value": 0.0, "interval": [0.0, 0.0]})
    assert found["cost"] < 1e-6 < found["cost of others"]["0.5, 0.5"]
    near = upward(cells["dense"], 1.0)
    assert 0 < len(near) < len(upward(cells["dense"])) and all(
        t.tokens >= b.tokens and t.batch >= b.batch for b, t in near
    )
