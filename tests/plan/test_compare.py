"""Rules side by side: each with its numbers or its reason for having none."""

from __future__ import annotations

from dataclasses import replace

import pytest

import mue
from mue.plan.compare import compare
from mue.plan.rules_page import BETWEEN, WIDER, WORKED
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
