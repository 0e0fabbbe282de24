"""Every fence of the README is run or read, and every number it quotes is the one that was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import mue
from mue.lab.demo.report import findings
from mue.layouts.of_model import placed
from mue.plan.replan import inputs_from_dict
from mue.plan.transfer import plan_of
from support.pages import commands, fences, understood
from support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = json.loads((ROOT / "docs/results/demo.json").read_text(encoding="utf-8"))
FENCES = fences(README)


def snippets(language: str) -> list[str]:
    return [text for name, text in FENCES if name == language]


def test_every_fence_is_one_that_is_tested_here() -> None:
    """Of the languages below and no other, and none is lost to the way they are found."""
    assert {name: len(snippets(name)) for name, _ in FENCES} == {"bash": 2, "diff": 1, "python": 1}
    assert 2 * len(FENCES) == len(re.findall(r"^ *```", README, flags=re.M))


@pytest.mark.parametrize("code", snippets("python"))
def test_python_snippets_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert isinstance(names["plan"], mue.Plan) and names["optimizer"].param_groups
    # every wiring of one's own, and nothing of ours: it is planned and checked as it stands
    here = {role for p in placed(names["model"]) for role in (p.role, *p.layout.parts)}
    assert here == {role for role, planned in names["plan"].roles.items() if planned.count} - {"qk_norm"}


def test_the_diff_runs() -> None:
    lines = [line[2:] for line in snippets("diff")[0].splitlines() if line.startswith("+ ")]
    code = "\n".join(line for line in lines if "model" not in line)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["plan"].route_scale == 8


def test_commands_are_understood() -> None:
    """Every line of the shell is a target of the Makefile or parses as a command line of mue, options included."""
    lines = commands(README)
    for line in lines:
        understood(line)
    assert len(lines) >= 10 and len({name for program, name, *_ in lines if program == "mue"}) >= 8
    with pytest.raises(Exception, match="--nonsense"):  # negative control: options are looked at
        understood(["mue", "plan", "plan.toml", "--nonsense"])


def test_quoted_numbers_are_the_measured_ones() -> None:
    quoted = README.partition("<!-- findings -->")[2].partition("<!-- /findings -->")[0]
    lines = [line.removeprefix("- ") for line in quoted.strip().splitlines()]
    assert lines == findings(DEMO) and len(lines) >= 3
    assert sum(bool(re.search(r"\d\.\d", line)) for line in lines) >= 3  # they do quote numbers


def numbers(plan: Mapping[str, Any]) -> dict[str, float]:
    """What a stored plan sets: its multipliers and betas, and the values of every role, by name."""
    kept = {k: plan[k] for k in ("output_multiplier", "route_scale", "residual_multiplier", "head_multiplier")}
    kept |= {f"betas {i}": beta for i, beta in enumerate(plan["betas"])}
    for role, row in plan["roles"].items():
        kept |= {f"{role} {field}": row[field] for field in ("init_std", "lr", "weight_decay", "eps")}
    return {name: value for name, value in kept.items() if value is not None}


def test_the_recorded_plan_is_the_one_that_follows() -> None:
    """Its numbers are those that its stored inputs give today, whatever a hash is made of meanwhile."""
    stored = DEMO["plan"]
    assert DEMO["runs"]["MoE"]["plan"] == stored["hash"]  # the file's own word on which plan was trained
    assert len(numbers(stored)) > 40
    assert numbers(plan_of(inputs_from_dict(stored["inputs"])).to_dict()) == pytest.approx(numbers(stored), rel=1e-12)
    inputs = json.loads(json.dumps(stored["inputs"]))
    inputs["tuned"]["lr"] *= 1.01  # negative control
    assert numbers(plan_of(inputs_from_dict(inputs)).to_dict()) != pytest.approx(numbers(stored), rel=1e-12)


def test_files_that_the_documents_name_exist() -> None:
    """All but what a command is told to write; the log speaks of its own day."""
    named: dict[str, set[str]] = {}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        if path.name != "LOG.md":
            text = re.sub(r"(--json|--out|-o|>) \S+", "", path.read_text(encoding="utf-8"))
            found = re.findall(r"\b(?:src|tests|benchmarks|docs)/[\w./-]+\.(?:py|md|json|toml|png|txt)", text)
            named |= {name: named.get(name, set()) | {path.name} for name in found}
    assert len(named) >= 15
    assert {name: where for name, where in named.items() if not (ROOT / name).exists()} == {}


def test_length_and_links() -> None:
    assert README.count("\n") < 200
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", README)
    assert len(links) >= 8
    for link in links:
        assert (ROOT / link).exists(), link
    assert len(mue.__all__) < 20
