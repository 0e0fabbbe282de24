"""Where a number comes from: derivations that end at the planned number, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest

import mue
from mue.fold import fold
from mue.plan.explain import why
from mue.plan.rules_page import BETWEEN, WORKED
from mue.plan.transfer import plan_of
from mue.rules.roles import ROLES
from mue.rules.sde import HORIZON
from mue.rules.table import CELLS
from support.sde import SDE

PLANS = {
    "worked": plan_of(WORKED),
    "folded": fold(plan_of(WORKED)),
    "chain": mue.transfer(plan_of(WORKED), mue.MoE.parse("64e4a", width=512, expert=256, layers=4)),
    "habits": plan_of(
        replace(
            WORKED,
            tuned=mue.HParams(1e-3, 1e-4, 0.01, roles={"ffn_down": {"lr": 2e-3}, "head": {"init_std": 0.1}}),
            convention=mue.Convention(weight_decay="independent", depth_scaled_init=True),
        )
    ),
    "malasnicki": plan_of(replace(BETWEEN, rule="malasnicki")),
    "mssp": plan_of(replace(BETWEEN, rule="mssp-all-scaling")),
    "tied": fold(
        mue.transfer(
            mue.Dense(width=64, ffn=64, layers=2, tied=True),
            mue.Mixed(
                128, (mue.Block(layers=1, ffn=96), mue.Block(layers=2, expert=32, experts=8, active=2)), tied=True
            ),
            mue.HParams(1e-3, 0.1, 0.02),
        )
    ),
}


@pytest.mark.parametrize("name", list(PLANS))
def test_a_derivation_ends_at_the_planned_number(name: str) -> None:
    """Every number of every role: the last step's value is the plan's, to rounding, and every step has a source."""
    plan, checked = PLANS[name], 0
    for role, planned in plan.roles.items():
        if not planned.count or not ROLES[role].trained:
            continue
        last = {step.number: step.value for step in why(plan, role)}
        assert all(step.source and step.text for step in why(plan, role))
        for field, text in CELLS.items():
            if ROLES[role].vector and field == "init_std":
                continue
            assert last[text] == pytest.approx(getattr(planned.values, field), rel=1e-12), (role, field)
            checked += 1
    assert checked >= 4 * 8  # of a dense model's matrices alone


def test_a_derivation_names_its_steps() -> None:
    steps = [s for s in why(PLANS["worked"], "expert_down") if s.number == "init std"]
    assert [round(s.value, 8) for s in steps] == [0.01, 0.00353553, 0.0106066, 0.0106066]
    assert "ρ_e^1/2 = 3" in steps[2].text and "active expansion" in steps[2].text and "Table 1" in steps[2].source
    rates = [s for s in why(PLANS["worked"], "expert_down") if s.number == "lr"]
    assert HORIZON in rates[-1].source and HORIZON not in rates[1].source  # each step its own source
    rates = [s for s in why(plan_of(replace(WORKED, options=SDE)), "expert_down") if s.number == "lr"]
    assert "Table 2" in rates[-1].source and "Table 2" not in rates[1].source
    habits = [s.text for s in why(PLANS["habits"], "expert_down")]
    assert "tuned.roles.ffn_down.lr on dense d128 L8" in habits
    assert any("√(2·8)" in t for t in habits) and any("/ lr" in t for t in habits)
    assert any("does not give it: left as tuned" in s.text for s in why(PLANS["malasnicki"], "router"))
    assert any("folded with c = 0.8889" in s.text for s in why(PLANS["folded"], "expert_down"))
    assert why(PLANS["tied"], "final_norm")[0].value == 0.5
    assert why(PLANS["worked"], "router_bias")[0].value == 0
    assert "base plan's value" in why(PLANS["chain"], "head")[0].text
    with pytest.raises(ValueError, match="did you mean 'expert_down'"):
        why(PLANS["worked"], "expert_dwn")
    with pytest.raises(ValueError, match="has no ffn_down"):
        why(PLANS["worked"], "ffn_down")
    with pytest.raises(ValueError, match="layer 9 does not exist"):
        why(PLANS["worked"], "norm", 9)
    assert why(PLANS["tied"], "ffn_down", 0) == why(PLANS["tied"], "ffn_down")


def test_a_fitted_law_shows_its_constants_its_range_and_its_answer() -> None:
    plan = plan_of(WORKED)
    steps = why(plan, "ling")
    assert [s.value for s in steps if s.text.startswith(("1.1576", "C, "))][:2] == pytest.approx(
        [1.1576, 8.741e19], rel=1e-3
    )
    assert "equation 3" in steps[0].source and "fitted for 3e+17 to 3e+20" in steps[1].source
    assert {s.number for s in steps} == {"lr", "batch"}
    refused = why(plan, "step-law")
    assert any(s.text.startswith("refuses: N") and s.value is None and s.shown == "–" for s in refused)
    assert why(plan, "zhou")[0].value is None  # a constant without units is not shown as one
    with pytest.raises(ValueError, match="did you mean 'step-law'"):
        why(plan, "step-lw")
