"""Every snippet of the README runs, and every number it quotes is the one that was measured."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

import mue
from mue.lab.demo.demo import findings
from mue.plan.toml import plan_inputs
from support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("code", snippets("python"))
def test_python_snippets_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    if "Tiny" in names:
        model = names["Tiny"](64, 64)  # type: ignore[operator]
        from mue.layouts.of_model import placed

        assert {p.role for p in placed(model)} == {"embedding", "ffn_up", "ffn_down", "head"}


def test_the_diff_runs() -> None:
    lines = [line[2:] for line in snippets("diff")[0].splitlines() if line.startswith("+ ")]
    code = "\n".join(line for line in lines if "model" not in line)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["plan"].route_scale == 8  # type: ignore[attr-defined]


def test_the_toml_plans() -> None:
    from mue.plan.transfer import plan_of

    plans = [plan_of(plan_inputs(tomllib.loads(text))) for text in snippets("toml")]
    assert plans[0].roles["expert_down"].values.init_std == pytest.approx(0.0106066, rel=1e-5)
    assert plans[1].output_multiplier is None  # its blocks differ
    assert plans[1].roles["embedding"].values.lr == 3e-3


def test_commands_exist() -> None:
    from typer.main import get_command

    from mue.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    for command in re.findall(r"^mue ([\w-]+)", "\n".join(snippets("bash")), flags=re.M):
        assert command in known
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(snippets("bash")), flags=re.M):
        assert f"\n{target}:" in makefile


def test_quoted_numbers_are_the_measured_ones() -> None:
    summary = json.loads((ROOT / "docs/results/demo.json").read_text(encoding="utf-8"))
    quoted = README.partition("<!-- findings -->")[2].partition("<!-- /findings -->")[0]
    assert [line.removeprefix("- ") for line in quoted.strip().splitlines()] == findings(summary)


def test_the_recorded_plan_is_the_one_that_follows() -> None:
    """The result file's plan is what today's code derives from the same inputs."""
    summary = json.loads((ROOT / "docs/results/demo.json").read_text(encoding="utf-8"))
    from mue.plan.replan import inputs_from_dict
    from mue.plan.transfer import plan_of

    plan = plan_of(inputs_from_dict(summary["plan"]["inputs"]))
    assert plan.hash == summary["plan"]["hash"] == summary["runs"]["MoE"]["plan"]


def test_length_and_links() -> None:
    assert README.count("\n") < 300
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    assert len(mue.__all__) < 20
