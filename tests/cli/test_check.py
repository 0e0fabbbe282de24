"""``mue check``: JSON, exit code 1 for what it finds, 3 for what it could not see."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from support.wiring.case import case

BUILD = """
import torch, mue
from mue.lab.models.language import LanguageModel

def build(plan):
    model = LanguageModel(plan.target, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(64, (2, 16))
    optimizer = torch.optim.AdamW(plan.param_groups(model))
    return {"model": model, "batch": (tokens, tokens), "optimizer": optimizer}

def wrong(plan):
    made = build(plan)
    made["model"].blocks[0].moe.router.route_scale = 1.0
    return made

def unseen(plan):
    made = build(plan)
    norm = made["model"].final_norm
    norm.forward = lambda x: norm.weight * x / x.abs().amax(-1, keepdim=True)
    return made
"""


def test_the_command_prints_json_and_fails_with_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from mue.cli import app

    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(BUILD)
    case("mue hybrid").plan.save("plan.json")
    right = CliRunner().invoke(app, ["check", "mine.py:build", "plan.json"])
    assert right.exit_code == 0 and "multipliers" in right.stdout
    wrong = CliRunner().invoke(app, ["check", "mine.py:wrong", "plan.json", "--json"])
    found = json.loads(wrong.stdout)
    assert wrong.exit_code == 1 and not found["ok"]
    assert any(
        "experts_down" in f["where"] and "route scale R = 4 is missing" in f["causes"] for f in found["findings"]
    )
    unseen = ["check", "mine.py:unseen", "plan.json"]
    result = CliRunner().invoke(app, unseen)
    assert result.exit_code == 3 and re.search(r"^multipliers +not measured", result.stdout, flags=re.M)
    assert CliRunner().invoke(app, [*unseen, "--allow-unmeasured", "head.*"]).exit_code == 0
    with pytest.raises(ValueError, match=r"mine\.py has no 'rong'; did you mean 'wrong'"):
        CliRunner().invoke(app, ["check", "mine.py:rong", "plan.json"], catch_exceptions=False)


def test_a_function_that_takes_no_plan_is_told_what_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mue.cli.user_model import arguments

    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def build():\n    pass\n")
    told = (
        r"own\.py:build is called with the plan, which it does not take .* returns a model, or a dict with model, batch"
    )
    with pytest.raises(ValueError, match=told):
        arguments("own.py:build", case("mue hybrid").plan)
