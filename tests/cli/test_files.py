"""``--set``: another value than the file's, wherever a file is read, and nothing that is set without being read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.main import get_command

from mue.cli import app
from mue.cli.files import read_plan, read_tables
from mue.plan.toml import PLAN_TABLES, TABLES
from support.command_line import in_process, refused
from support.plan_file import PLAN

BLOCKS = PLAN.partition("[target]")[0] + (
    '[target]\nwidth = 64\n[[target.blocks]]\nlayers = 1\nffn = 64\n[[target.blocks]]\nlayers = 2\nmoe = "4e2a"\nexpert = 32\n'
)


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def test_what_may_be_set(plan_file: Path) -> None:
    change = [
        "target.width=2048",
        'rule = "mup"',
        "tuned.betas=[0.9, 0.99]",
        "tuned.roles.head.lr=1e-4",
        "tuned.clip=1",
    ]
    found = read_tables(plan_file, change, PLAN_TABLES)
    assert found["target"]["width"] == 2048 and found["target"]["expert"] == 1024
    assert found["rule"] == "mup" and found["tuned"]["betas"] == [0.9, 0.99]
    assert found["tuned"]["roles"] == {"head": {"lr": 1e-4}}
    assert read_tables(plan_file, None, PLAN_TABLES)["target"]["width"] == 1024  # the negative control
    plan_file.write_text(BLOCKS)
    assert read_tables(plan_file, ["target.blocks.1.layers=5"], PLAN_TABLES)["target"]["blocks"][1]["layers"] == 5


def test_tables_of_other_commands_may_stand_in_the_file(plan_file: Path) -> None:
    plan_file.write_text(PLAN + '[data]\nsource = "stdlib"\n[roles]\nrounds = 1\n[sweep]\nlr = [1]\n[run]\nseed = 1\n')
    assert set(read_tables(plan_file, None, ("base", "run"))) == {"base", "run"}
    assert read_plan(plan_file).hash == read_plan(plan_file, ["rule='complete-mue'"]).hash


def test_a_file_of_another_kind_says_what_it_may_hold(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text("[study]\nseeds = 2\n")
    assert read_tables(path, ["study.seeds=3"], ("study",), known=("study", "base")) == {"study": {"seeds": 3}}
    with pytest.raises(ValueError, match="would change nothing"):
        read_tables(path, ["base.width=3"], ("study",), known=("study", "base"))
    with pytest.raises(ValueError, match="unknown key 'study'"):  # the negative control
        read_tables(path, None, PLAN_TABLES)


WRONG = {
    "target": ("write KEY=VALUE",),
    "=3": ("write KEY=VALUE",),
    "a b=3": ("write KEY=VALUE",),
    "rule=mup": ("not a TOML value", "'rule=\"mup\"'"),
    "target.width=": ("not a TOML value",),
    "target.widht=64": ("unknown key 'widht' in [target]", "did you mean 'width'"),
    "tuned.bettas=[0.9, 0.95]": ("did you mean 'betas'",),
    "tuned.roles.haed.lr=1": ("haed", "head"),
    "tagret.width=64": ("tagret", "target"),
    "width=64": ("unknown key 'width'",),
    "target.width.x=64": ("width is 1024 and has no x",),
    "target.width=true": ("width must be a whole number",),
    "sweep.lr=[1]": ("would change nothing", "and not sweep"),
    "base=3": ("[base] must be a table",),
}


@pytest.mark.parametrize("setting", WRONG)
def test_what_is_refused(
    setting: str, plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(in_process(capsys, monkeypatch, "plan", plan_file, "--set", setting), *WRONG[setting])


def test_twice_is_refused(plan_file: Path) -> None:
    with pytest.raises(ValueError, match=r"--rule mup and --set rule=\"standard\" set the same value"):
        read_tables(plan_file, ['rule="standard"'], PLAN_TABLES, {"rule": "mup"})
    with pytest.raises(ValueError, match="set the same value"):
        read_tables(plan_file, ["target.width=1", "target.width=1"], PLAN_TABLES)
    with pytest.raises(ValueError, match="not a TOML value"):  # one key and no more
        read_tables(plan_file, ["target.width=1\nlr=2"], PLAN_TABLES)
    plan_file.write_text(BLOCKS)
    with pytest.raises(ValueError, match=r"'2' is none of the 2 entries"):
        read_tables(plan_file, ["target.blocks.2.layers=5"], PLAN_TABLES)


def test_a_plan_that_was_made_is_not_changed(plan_file: Path) -> None:
    made = plan_file.with_suffix(".json")
    read_plan(plan_file).save(made)
    assert read_plan(made).hash == read_plan(plan_file).hash
    with pytest.raises(ValueError, match=r"--set changes a plan file \(TOML\)"):
        read_plan(made, ["target.width=64"])


def test_every_command_with_a_toml_file_has_it(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is given a key that is none, and says so; a command without a file has no ``--set``."""
    wrong, key = ("--set", "base.widht=3"), ("'widht' in [base]", "did you mean 'width'")
    plan_file.write_text(PLAN + '[data]\nsource = "stdlib"\n')
    sweep_file = plan_file.with_name("sweep.toml")
    grid = "[sweep]\nlr = [1e-3]\nweight_decay = [0.1]\ninit_std = [0.1]\n"
    sweep_file.write_text(PLAN.partition("[tuned]")[0] + grid)
    commands = {
        "demo": ("-o", tmp_path / "d"),
        "plan": (plan_file,),
        "rules": (plan_file,),
        "sweep": (sweep_file, "-o", tmp_path / "s"),
        "tune-roles": (plan_file, "-o", tmp_path / "r"),
        "train": (plan_file, "-o", tmp_path / "t"),
        "check": ("llama", plan_file),
        "export": (plan_file, "--to", "torch"),
        "convert": (plan_file, "--plan", plan_file, "--to", "folded", "--out", tmp_path / "c"),
    }
    every = get_command(app).commands  # type: ignore[attr-defined]
    assert {name for name, c in every.items() if any("--set" in p.opts for p in c.params)} == set(commands)
    for name, arguments in commands.items():
        refused(in_process(capsys, monkeypatch, name, *arguments, *wrong), *key)
    assert {p.name for p in tmp_path.iterdir()} == {"plan.toml", "sweep.toml"}


def test_options_that_stand_for_a_key(
    plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashed(*more: str) -> str:
        code, out, err = in_process(capsys, monkeypatch, "plan", plan_file, "--json", *more)
        assert code == 0, err
        return str(json.loads(out)["hash"])

    assert hashed("--rule", "standard") == hashed("--set", "rule='standard'") != hashed()
    assert hashed("--fold") != hashed("--fold", "--route", "model") != hashed()
    refused(in_process(capsys, monkeypatch, "plan", plan_file, "--route", "model"), "--fold")
    assert set(PLAN_TABLES) < set(TABLES)
