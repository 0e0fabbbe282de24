"""The options of a rule: duration exponent, betas, weight decay under width, the up-gate correction."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mue
from mue.plan.compare import compare
from mue.plan.toml import plan_inputs
from mue.plan.transfer import plan_of
from mue.rules import OPTIONS, RULES, Row, Rule
from mue.rules.algebra import ratio
from mue.rules.options import Option
from mue.rules.roles import ROLES
from support import rule_properties as properties
from support.optimizer_plans import DENSE, RUN, SPARSE, WIDE, at, few
from support.rule_properties import TUNED, Case, cases, plan, trainings
from support.sde import SDE


@few
@given(data=st.data(), training=trainings(), q=st.sampled_from([0.28, 0.3, 0.5, 0.75]))
def test_another_duration_exponent_loses_the_horizon_and_nothing_else(
    data: st.DataObject, training: mue.Training, q: float
) -> None:
    base = data.draw(cases("complete-mue", 1))[0]
    short = Case(base.shape, mue.Training(base.training.batch, 4000))
    target = Case(base.shape, mue.Training(short.training.batch * 2, training.steps))
    properties.sde("complete-mue", short, target, exponent=q)
    p = plan("complete-mue", short, target, **SDE | {"duration_exponent": str(q)})
    lost = re.compile(r"gives up.*T·η²")
    assert any(lost.search(note) for note in p.notes) == (q != 0.5 and target.training.tokens != short.training.tokens)


def test_control_the_horizon_is_lost_by_another_exponent() -> None:
    p = plan("complete-mue", Case(DENSE, RUN), Case(DENSE, replace(RUN, steps=8000)), duration_exponent=0.3)
    lr = p.roles["ffn_up"].factor.lr or 0
    assert lr == pytest.approx(2**-0.3) and 2 * lr**2 != pytest.approx(1, rel=0.1)


def test_beta_domain_with_another_exponent() -> None:
    """The fewest steps it names are the fewest that work."""
    base, tuned, by = Case(DENSE, RUN), TUNED.replace(betas=(0.9, 0.95)), SDE | {"duration_exponent": "0.3"}
    with pytest.raises(ValueError, match=r"beta1 = 0\.9 cannot be carried") as error:
        plan("complete-mue", base, Case(DENSE, mue.Training(RUN.batch * 4, 50)), tuned, **by)
    needed = int(str(error.value).split("at least ")[1].split(" steps")[0].replace(",", ""))
    plan("complete-mue", base, Case(DENSE, mue.Training(RUN.batch * 4, needed)), tuned, **by)
    with pytest.raises(ValueError, match="cannot be carried"):
        plan("complete-mue", base, Case(DENSE, mue.Training(RUN.batch * 4, needed - 1)), tuned, **by)


@few
@given(steps=st.integers(1, 40_000))
def test_power_betas_never_leave_their_domain_and_agree_to_first_order(steps: int) -> None:
    p = plan("complete-mue", Case(DENSE, RUN), Case(DENSE, replace(RUN, steps=steps)), **SDE | {"betas": "power"})
    factor = RUN.steps / steps
    assert all(0 <= b < 1 for b in p.betas) and p.betas[0] == pytest.approx(0.9**factor)
    if factor < 2:
        linear = plan("complete-mue", Case(DENSE, RUN), Case(DENSE, replace(RUN, steps=steps)), **SDE)
        assert 1 - p.betas[1] == pytest.approx(1 - linear.betas[1], rel=0.06)


@pytest.mark.parametrize(("mode", "power"), [("constant-product", 1), ("sqrt-width", 0.5), ("none", 0)])
def test_weight_decay_under_width(mode: str, power: float) -> None:
    p = at("adamw", SPARSE, weight_decay_width=mode)
    for role in ("attention_q", "expert_down", "router", "shared_up"):
        assert p.roles[role].factor.weight_decay == pytest.approx(4**power), role
    assert p.roles["embedding"].factor.weight_decay == p.roles["head"].factor.weight_decay == 1


@pytest.mark.parametrize("target", [SPARSE, WIDE])
def test_the_up_gate_correction_removes_the_drift_and_nothing_else(target: Any) -> None:
    plain, corrected = at("adamw", target), at("adamw", target, up_gate_correction=True)
    drift = plain.drift["up_gate"]
    assert drift and drift != 1 and corrected.drift["up_gate"] == pytest.approx(1)
    for role in plain.roles:
        one, two = plain.roles[role].values, corrected.roles[role].values
        if ROLES[role].part in ("up", "gate"):
            assert one.lr and two.lr and one.weight_decay and two.weight_decay
            assert two.lr == pytest.approx(one.lr / drift)
            assert two.lr * two.weight_decay == pytest.approx(one.lr * one.weight_decay)
        else:
            assert one == two, role


def test_the_depth_exponent_may_stand_second() -> None:
    assert mue.get_rule("complete-mue", "1/2") == mue.get_rule("complete-mue", depth_exponent="1/2")
    assert mue.get_rule("complete-mue", "1/2") != mue.get_rule("complete-mue")
    with pytest.raises(ValueError, match="has no option depth_exponent"):
        mue.get_rule("mup", "1/2")


def test_options_are_printed_saved_and_refused() -> None:
    p = at("adamw", duration_exponent=0.3, head="paper")
    assert p.to_dict()["options"]["duration_exponent"] == "3/10" and "duration_exponent 3/10" in str(p)
    assert p.to_dict()["inputs"]["options"]["head"] == "paper"
    for rule in mue.RULES:
        for name in set(OPTIONS) - set(mue.get_rule(rule).options):
            with pytest.raises(ValueError, match=f"has no option {name}"):
                mue.get_rule(rule, **{name: "x"})


@pytest.fixture
def power_of_width() -> Iterator[None]:
    """A rule from outside, with an option that no other rule has."""
    OPTIONS.register("width_power")(Option("p: rates of hidden matrices × ρ_d^-p", Fraction(1, 4), Fraction(1)))

    @RULES.register("power-of-width")
    def power_of_width(width_power: Fraction = Fraction(1), head: str = "completep") -> Rule:
        hidden, rest = Row(lr=ratio("ρ_d") ** -width_power, source="this test"), Row(source="this test")
        rows = {name: hidden if role.hidden else rest for name, role in ROLES.items()}
        return Rule("power-of-width", title="lr ∝ d^-p", source="this test", rows=rows)

    yield
    RULES._entries.pop("power-of-width")
    OPTIONS._entries.pop("width_power")


OWN = """
rule = "power-of-width"
options = {width_power = 0.5}
base = {width = 64, ffn = 64, layers = 2, head_dim = 16}
tuned = {lr = 0.01, weight_decay = 0.1, init_std = 0.1}
target = {width = 256, ffn = 256, layers = 2, head_dim = 16}
"""


@pytest.mark.usefixtures("power_of_width")
def test_a_rule_of_ones_own_has_options_of_its_own(tmp_path: Path) -> None:
    """As keywords, in a plan file, in a saved plan, beside the other rules; other rules refuse them."""
    base, target = (mue.Dense(width=w, ffn=w, layers=2, head_dim=16) for w in (64, 256))
    tuned = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1)
    p = mue.transfer(base, target, tuned, rule="power-of-width", width_power="1/2", head="paper")
    assert p.role("ffn_up").factor.lr == pytest.approx(1 / 2) and p.rule.options["head"] == "paper"
    assert mue.transfer(base, target, tuned, rule="power-of-width").role("ffn_up").factor.lr == pytest.approx(1 / 4)
    p.save(tmp_path / "plan.json")
    assert mue.Plan.load(tmp_path / "plan.json").hash == p.hash
    inputs = plan_inputs(tomllib.loads(OWN))
    assert plan_of(inputs) == mue.transfer(base, target, tuned, rule="power-of-width", width_power=0.5)
    sides = compare(inputs).plans
    assert sides["power-of-width"].rule.options["width_power"] == Fraction(1, 2) and "complete-mue" in sides
    with pytest.raises(ValueError, match=r"width_power must be a number in \[1/4, 1\], got 2"):
        mue.transfer(base, target, tuned, rule="power-of-width", width_power=2)
    with pytest.raises(ValueError, match="rule 'complete-mue' has no option width_power: it has depth_exponent, "):
        mue.transfer(base, target, tuned, width_power=0.5)
    with pytest.raises(ValueError, match=r"unknown key 'width_powr' in \[options\]; did you mean 'width_power'"):
        plan_inputs(tomllib.loads(OWN.replace("width_power =", "width_powr =")))


@pytest.mark.parametrize(("wrong", "meant"), [("trainin", "training"), ("depth_exponnent", "depth_exponent")])
def test_a_keyword_that_is_no_option_is_refused(wrong: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{wrong}'; did you mean '{meant}'\?"):
        mue.transfer(mue.Dense(64, 64, 2), mue.Dense(64, 64, 2), mue.HParams(0.01, 0.1, 0.1), **{wrong: None})


@pytest.mark.usefixtures("power_of_width")
def test_control_an_option_that_nobody_explained_is_refused() -> None:
    assert mue.get_rule("power-of-width").options["width_power"] == 1
    option = OPTIONS._entries.pop("width_power")
    try:
        with pytest.raises(ValueError, match=r"takes width_power, and no option has that name: .*OPTIONS\.register"):
            mue.get_rule("power-of-width")
    finally:
        OPTIONS._entries["width_power"] = option
