"""Rules side by side: each with its numbers or its reason for having none."""

from __future__ import annotations

from dataclasses import replace

import pytest

import mue
from mue.plan.compare import compare, comparison_text
from mue.plan.laws import answers
from mue.plan.rules_page import BETWEEN, WIDER, WORKED
from mue.plan.transfer import plan_of
from mue.rules.laws.law import LAWS
from support.sde import SDE


def test_every_rule_is_there_with_numbers_or_a_reason() -> None:
    for inputs in (WORKED, BETWEEN, WIDER):
        made = compare(inputs)
        assert set(made.plans) | set(made.refused) == set(mue.RULES) and not set(made.plans) & set(made.refused)
        assert all(made.refused.values())
    assert "hold the sparsity a/N fixed" in compare(WORKED).refused["jiang"]
    assert set(compare(BETWEEN).refused) == {"completep", "complete-d-p", "mup", "u-mup", "hyperp", "mssp-bottleneck"}
    assert {"complete-mue", "mup", "completep", "u-mup", "jiang"} <= set(compare(WIDER).plans)


def test_the_table_shows_the_plans_factors() -> None:
    made = compare(replace(WORKED, options=SDE))
    header, rows = made.table()
    assert header[:2] == ["role", "factor on"] and all(len(row) == len(header) for row in rows)
    start = next(i for i, row in enumerate(rows) if row[0] == "expert_down")
    column = header.index("complete-mue")
    assert [rows[start + i][column] for i in range(3)] == ["1.061", "0.0625", "4"]
    assert rows[start + 1][header.index("standard")] == "1"
    data = made.to_dict()
    assert data["rules"]["complete-mue-paper"]["factors"]["expert_down"]["weight_decay"] == pytest.approx(0.5)
    assert data["rules"]["hidden-ratio-only"]["factors"]["router"]["unknown"] == ["eps"]
    assert data["rules"]["complete-mue"]["whole"]["output_multiplier"] == pytest.approx(1 / 9)
    assert "init_std" not in data["rules"]["complete-mue"]["factors"]["norm"]
    between = compare(BETWEEN)
    header, rows = between.table()
    marked = [cell for row in rows for cell in row]
    assert "?" in marked and any("shared" in cell for cell in marked) and any("zero" in cell for cell in marked)


def test_options_go_to_the_rules_that_have_them() -> None:
    made = compare(replace(WORKED, options={"depth_exponent": "1/2", "head": "paper"}))
    assert made.plans["complete-mue"].rule.options["head"] == "paper"
    assert str(made.plans["complete-mue-paper"].rule.options["depth_exponent"]) == "1/2"
    with pytest.raises(ValueError, match="did you mean 'mup'"):
        compare(WORKED, ["mupp"])
    with pytest.raises(ValueError, match="no answer for experts"):
        compare(replace(WORKED, rule="mup"))


def test_fitted_laws_stand_below_the_rules_with_numbers_or_their_range() -> None:
    made = compare(WORKED)
    said = {(answer.law, answer.sets): answer for answer in made.laws}
    assert {name for name, _ in said} == set(LAWS)
    ling, zhou = said["ling", "lr"], said["zhou", "lr"]
    assert ling.value == pytest.approx(1.0339e-3, rel=1e-3) and ling.times == pytest.approx(1.0339, rel=1e-3)
    assert said["ling", "batch"].times == pytest.approx(1282527 / 2**19, rel=1e-4)
    assert "N = 3.281e+09, fitted for 5.9e+07 to 2.2e+09" in said["step-law", "lr"].text
    # of a law in unknown units the ratio to the base, if that is one of its models as well
    assert zhou.value is None and zhou.refused == "ratios only; base E = 1, fitted for 2 and more"
    runs = mue.Training(2**15, 1000), mue.Training(2**15, 4000)
    between = {
        a.law: a for a in compare(replace(BETWEEN, base_training=runs[0], training=runs[1])).laws if a.sets == "lr"
    }
    assert between["zhou"].times == pytest.approx(4**-0.3509 * _active_ratio() ** -0.2219, rel=1e-9)
    assert all(a.refused and a.value is None for a in compare(BETWEEN).laws)  # no run, or sizes nobody fitted
    assert "needs R" in next(a.refused for a in compare(BETWEEN).laws if a.law == "power-lines")


def test_laws_compare_their_adamw_rates_with_an_adamw_rate() -> None:
    tuned = WORKED.tuned
    assert tuned is not None
    beside = tuned.replace(optimizer="muon", lr=0.02, adamw_lr=2e-3)
    for muon, times, text in ((beside, 0.51695, " × tuned adamw_lr; AdamW"), (beside.replace(adamw_lr=None), None, "")):
        said = {a.law: a for a in answers(replace(WORKED, tuned=muon)) if a.sets == "lr"}
        assert said["ling"].value == pytest.approx(1.0339e-3, rel=1e-3)
        assert said["ling"].times == (None if times is None else pytest.approx(times, rel=1e-3))
        assert said["ling"].text.endswith(text) and ("×" in said["ling"].text) == bool(text)
        assert said["zhou"].refused == "ratios only, of AdamW's rate, and the plan's optimizer is 'muon'"
    # the control: with AdamW it is the one rate
    assert next(a for a in answers(WORKED) if a.law == "ling").text.endswith(" × tuned; AdamW")


def test_ratios_over_a_chain_of_plans_start_where_the_rate_was_tuned() -> None:
    runs = mue.Training(2**15, 1000), mue.Training(2**15, 4000)
    whole = replace(BETWEEN, base_training=runs[0], training=runs[1])
    chain = replace(whole, base=plan_of(whole), tuned=None, base_training=None, training=None)
    twice = replace(chain, base=plan_of(chain))
    said = [{a.law: a for a in answers(inputs)}["zhou"] for inputs in (whole, chain, twice)]
    assert said[0].times != pytest.approx(1, rel=0.1)  # which it is from the plan's own target
    assert said[0] == said[1] == said[2]


def _active_ratio() -> float:
    sizes = [s.active_parameters - s.vocab * s.width for s in (BETWEEN.target, BETWEEN.base) if isinstance(s, mue.MoE)]
    return sizes[0] / sizes[1]


def test_the_worked_example_fits_a_hundred_columns_and_is_one_table() -> None:
    text = comparison_text(compare(WORKED))
    assert max(map(len, text.split("\n"))) <= 100
    table = text.split("\n\n")[1].split("\n")
    names = [line.split("  ")[0] for line in table]
    assert names.index("expert_down") < names.index("fitted law") < names.index("step-law") < names.index("zhang")


def test_exponents_of_others_stand_beside_the_chosen_ones() -> None:
    made = compare(WORKED)
    shown = {e.whose: (e.p, e.q, e.factor) for e in made.exponents}
    assert shown["complete-mue"] == (0.35, 0, 1) and shown["SDE"] == (0.5, 0.5, 0.5)
    assert shown["zhou"][:2] == (None, 0.3509) and shown["step-law"][1] == -0.307
    fitted = [q for whose, (_, q, _) in shown.items() if whose.startswith(("marin", "zhou"))]
    assert min(fitted) >= 0.28 and max(fitted) <= 0.40  # type: ignore[type-var]
    assert shown["marin"][2] == pytest.approx(4**-0.2813) and "nmoe" not in shown
    assert compare(replace(WORKED, base_training=None, training=None)).exponents == ()  # nothing to move
    assert made.to_dict()["exponents"][1]["whose"] == "SDE"
