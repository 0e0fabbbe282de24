"""All rules side by side, one number step by step, and the page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import mue
from mue.fold import fold
from mue.plan.compare import compare, formulas
from mue.plan.explain import why
from mue.plan.rules_page import BETWEEN, WIDER, WORKED, markdown
from mue.plan.transfer import plan_of
from mue.rules.roles import ROLES
from mue.rules.table import CELLS
from support.paths import ROOT


def test_every_rule_is_there_with_numbers_or_a_reason() -> None:
    for inputs in (WORKED, BETWEEN, WIDER):
        made = compare(inputs)
        assert set(made.plans) | set(made.refused) == set(mue.RULES) and not set(made.plans) & set(made.refused)
        assert all(made.refused.values())
    assert "hold the sparsity a/N fixed" in compare(WORKED).refused["jiang"]
    assert set(compare(BETWEEN).refused) == {"completep", "complete-d-p", "mup", "u-mup", "hyperp", "mssp-bottleneck"}
    assert {"complete-mue", "mup", "completep", "u-mup", "jiang"} <= set(compare(WIDER).plans)


def test_the_table_shows_the_plans_factors() -> None:
    made = compare(WORKED)
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
    assert "Table 2" in rates[-1].source and "Table 2" not in rates[1].source  # each step its own source
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


@pytest.mark.parametrize("rule", list(mue.RULES))
def test_every_row_has_a_source_and_a_mark(rule: str) -> None:
    the_rule = mue.get_rule(rule)
    for role, row in the_rule.rows.items():
        assert len(row.source) > 10 and row.status in ("published", "authors' code", "inferred"), role
    covered = [role for line in formulas(the_rule) for role in line[0].split(", ")]
    assert sorted(covered) == sorted(role for role in the_rule.rows if ROLES[role].trained)
    text = f"{the_rule.source} {' '.join(row.source for row in the_rule.rows.values())}"
    assert rule in ("standard", "hidden-ratio-only") or any(c.isdigit() for c in text)


def test_the_page_is_fresh() -> None:
    """docs/rules.md is what the tables say: write it again with ``mue rules --markdown > docs/rules.md``."""
    assert (ROOT / "docs" / "rules.md").read_text(encoding="utf-8") == markdown()
    for rule in mue.RULES:
        assert f"\n## {rule}\n" in markdown()


CONFIG = """
[base]
width = 128
ffn = 128
layers = 8
[tuned]
lr = 1e-3
weight_decay = 0.1
init_std = 0.01
[target]
moe = "128e8a1s"
width = 1024
expert = 1024
layers = 8
"""


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mue.cli import main

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mue", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    file = tmp_path / "moe.toml"
    file.write_text(CONFIG)
    code, table, _ = command("rules", file)
    assert code == 0 and "complete-mue-paper" in table and "jiang" in table
    assert json.loads(command("rules", file, "--json")[1])["refused"]["mup"]
    steps = command("rules", file, "--why", "expert_down")[1]
    assert "ρ_e^1/2 = 3" in steps and "0.0106066" in steps
    assert json.loads(command("rules", file, "--why", "head", "--json")[1])[0]["number"] == "init std"
    assert command("rules", "--markdown")[1] == markdown()
    for arguments, message in (
        (("rules",), "needs a plan file"),
        (("rules", file, "--why", "expert_dow"), "did you mean 'expert_down'"),
        (("rules", tmp_path / "none.toml"), "does not exist"),
    ):
        code, out, err = command(*arguments)
        assert code == 2 and message in err and not out and err.count("\n") == 1
