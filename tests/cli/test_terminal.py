"""What commands write where stdout is not UTF-8: plain characters, exit code 0, and the same results."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import mue
from mue.cli import COMMANDS
from mue.cli.terminal import plain
from support.command_line import in_encoding, in_process
from support.plan_file import PLAN

SHAPES = "width = 32\nlayers = 2\nhead_dim = 16\nsequence = 32\n[base.training]\nbatch = 128\nsteps = 4\n[tuned]\nlr = 0.01\nweight_decay = 0.1\ninit_std = 0.1\n"
OWN = "import mue\nfrom mue.lab.models.language import LanguageModel\ndef build(plan):\n    return LanguageModel(plan.target, plan.multipliers)\ndef planned(plan):\n    model = build(plan)\n    plan.init_(model)\n    return model\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("plan.toml").write_text(PLAN)
    Path("small.toml").write_text(
        "[base]\nffn = 32\n" + SHAPES.replace("batch = 128\nsteps = 4", "batch = 128\nsteps = 4")
        + '[target]\nmoe = "4e2a"\nexpert = 32\nwidth = 64\nlayers = 2\nhead_dim = 16\nsequence = 32\n'
        + "[target.training]\nbatch = 128\nsteps = 4\n"
    )  # fmt: skip
    Path("encoded_model.py").write_text(OWN)
    return tmp_path


RESULTS = {
    "plan": (("plan", "plan.toml"), "rho_d"),
    "rules": (("rules", "plan.toml"), "1-beta1"),
    "rules --why": (("rules", "plan.toml", "--why", "expert_down"), "rho_d"),
    "rules --markdown": (("rules", "--markdown"), "rho_d"),
    "check": (("check", "encoded_model.py:planned", "small.toml"), "coverage"),
    "export": (("export", "small.toml", "--to", "torch"), "ROWS"),
}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("name", RESULTS)
def test_results_in_plain_characters(
    name: str, encoding: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    command, word = RESULTS[name]
    code, out, err = in_encoding(encoding, capsys, monkeypatch, *command)
    assert code == 0, err
    assert word in out.decode(encoding)
    if name == "export":  # a file that Python reads, though Python's sources are UTF-8
        ast.parse(out)
    code, out, _ = in_encoding("utf-8", capsys, monkeypatch, *command)  # the negative control: whole characters
    assert code == 0 and (name == "export" or not out.isascii())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_is_shown(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = "tune-roles" if command == "tune" else command.replace("_", "-")
    code, out, err = in_encoding("ascii", capsys, monkeypatch, name, "--help")
    assert code == 0 and out.isascii(), err
    assert name.encode() in out


@pytest.mark.parametrize("command", [("plan", "plan.toml", "--json"), ("rules", "plan.toml", "--json")])
def test_json_is_the_same_in_every_encoding(
    command: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain_out, _ = in_encoding("latin-1", capsys, monkeypatch, *command)
    _, whole, _ = in_encoding("utf-8", capsys, monkeypatch, *command)
    assert plain_out.isascii() and not whole.isascii()
    assert json.loads(plain_out) == json.loads(whole)
    if command[0] == "plan":
        (here / "plan.json").write_bytes(plain_out)
        assert mue.Plan.load(here / "plan.json").hash == json.loads(whole)["hash"]


def test_a_sweep_and_a_training_end_with_all_their_files(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A character in the table ended the sweep after all of its training, without report and CSV."""
    fewer = ("--set", "sweep.lr=[0.01]", "--set", "sweep.init_std=[0.1]", "--set", "base.training.steps=10")
    command = ("sweep", experiment, "-o", tmp_path / "s", "-w", 1, "--csv", tmp_path / "trials.csv", *fewer)
    code, out, err = in_encoding("ascii", capsys, monkeypatch, *command)
    assert code == 0, err
    assert (tmp_path / "s" / "report.html").exists() and (tmp_path / "trials.csv").exists()
    assert b"valley over lr" in out and b"report: " in out
    experiment.write_text(experiment.read_text() + "[tuned]\nlr = 0.01\nweight_decay = 0.1\ninit_std = 0.1\n")
    fewer = ("--set", "base.training.steps=10")
    code, out, err = in_encoding("ascii", capsys, monkeypatch, "train", experiment, "-o", tmp_path / "t", *fewer)
    assert code == 0, err
    code, out, err = in_encoding("latin-1", capsys, monkeypatch, "report", tmp_path / "t")
    assert code == 0 and b"report: " in out


def test_a_name_that_is_no_utf8_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = in_process(capsys, monkeypatch, "plan", f"{tmp_path}/\udce9.toml")
    assert code == 2 and r"\udce9.toml does not exist" in err


def test_plain_words() -> None:
    assert plain("ρ_d^-1 · √E* ≥ 2·10³ → ▁▄█ ─│╭ Σ") == "rho_d^-1 * sqrtE* >= 2*10^3 -> 148 -|+ Sigma"
    assert plain("plain") == "plain" and plain("日") == r"\u65e5"
