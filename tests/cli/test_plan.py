"""``mue plan``: what it prints and saves, and that every mistake is one clear line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mue
from support.command_line import in_process, refused, run
from support.plan_file import PLAN
from support.sde import SDE


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def test_plan_prints_and_saves(plan_file: Path) -> None:
    page = plan_file.with_name("plan.html")
    shown = run("plan", plan_file, "--html", page)
    assert shown.returncode == 0, shown.stderr
    assert f"page: {page}" in shown.stdout and "How the factors move" in page.read_text(encoding="utf-8")
    for role in ("expert_down", "router", "head", "ρ_d^-1"):
        assert role in shown.stdout
    result = run("plan", plan_file, "--json", "--save", plan_file.with_name("plan.json"))
    data = json.loads(result.stdout)
    assert data["roles"]["expert_down"]["init_std"] == pytest.approx(0.0106066, rel=1e-5)
    assert mue.Plan.load(plan_file.with_name("plan.json")).hash == data["hash"]
    other = json.loads(run("plan", plan_file, "--json", "--rule", "standard").stdout)
    assert other["roles"]["expert_down"]["init_std"] == 0.01


def test_printed_width_decides_the_columns(plan_file: Path) -> None:
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, "-c", "from mue.cli import main; main()", "plan", str(plan_file)]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert "ρ_d^-1" not in out
    assert "expert_down" in out


@pytest.mark.parametrize("command", [("plan",), ("rules",)])
def test_a_value_of_the_base_that_the_target_leaves_out_is_a_warning(
    command: tuple[str, ...], plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "[target] gated is not given and true, [base] has false: say which"
    assert "warning:" not in in_process(capsys, monkeypatch, *command, plan_file)[2]
    plan_file.write_text(plan_file.read_text().replace("[base]", "[base]\ngated = false", 1))
    code, _, err = in_process(capsys, monkeypatch, *command, plan_file)
    assert code == 0 and f"warning: {line}\n" in err
    if command == ("plan",):
        page = plan_file.with_name("plan.html")
        in_process(capsys, monkeypatch, *command, plan_file, "--html", page)
        html = page.read_text(encoding="utf-8")
        assert html.index(line) < html.index("<table")


SDE_OPTIONS = "[options]\n" + "".join(f"{name} = '{value}'\n" for name, value in SDE.items())
SPOILED = {
    "misspelt key": (("[base]\nwidth", "[base]\nwidht"), ("widht", "width")),
    "misspelt table": (("[tuned]", "[tunde]"), ("tunde", "tuned")),
    "a > N": (("128e8a1s", "8e16a"), ("16 active of 8",)),
    "groups": (("128e8a1s", "128e8a3g"), ("3 groups",)),
    "zero": (("lr = 1e-3", "lr = 0"), ("lr", "greater than 0")),
    "negative": (("width = 128", "width = -128"), ("width", "-128")),
    "nan": (("lr = 1e-3", "lr = nan"), ("lr", "finite")),
    "infinite": (("init_std = 0.01", "init_std = inf"), ("init_std", "finite")),
    "heads": (("width = 1024", "width = 1000"), ("1000", "head_dim")),
    "betas": (("[target.training]\nbatch = 524288\nsteps = 100000\n", f"[target.training]\nbatch = 524288\nsteps = 1000\n{SDE_OPTIONS}"), ("beta1", "2,501 steps")),
    "one training": (("[target.training]\nbatch = 524288\nsteps = 100000\n", ""), ("base_training",)),
    "gates": (("layers = 8\n[target.training]", 'layers = 8\nrouter = "softmax"\nnormalize = false\n[target.training]'), ("measured",)),
    "rule": (('"complete-mue"', '"complete-mu"'), ("complete-mue",)),
    "not toml": (("[base]", "[base"), ("TOML",)),
    "rule of another type": (('"complete-mue"', '["mup"]'), ("unknown rule",)),
    "a number beyond reason": (("batch = 524288", "batch = 1" + "0" * 400), ("10^18",)),
    "text for a switch": (("expert = 1024", 'expert = 1024\nnormalize = "false"'), ("normalize", "true or false")),
    "one gate moment": (("expert = 1024", 'expert = 1024\ngates = "measured"\ngate_moments = 0.3'), ("gate_moments",)),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILED)
def test_bad_plan_files(
    fault: str, plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (old, new), words = SPOILED[fault]
    text = plan_file.read_text()
    assert old in text
    plan_file.write_text(text.replace(old, new, 1))
    refused(in_process(capsys, monkeypatch, "plan", plan_file, "--save", plan_file.with_name("out.json")), *words)
    assert not plan_file.with_name("out.json").exists()


def test_tuned_needs_a_finished_sweep(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(in_process(capsys, monkeypatch, "plan", plan_file, "--tuned", tmp_path), "tuned")
