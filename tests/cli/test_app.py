"""The command line as a whole: its commands, and that the help of each teaches it."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from mue.cli import COMMANDS, app
from support.command_line import in_process, refused, run
from support.paths import ROOT

COMMANDS_BY_NAME: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
WITH_A_FILE = {
    "plan": {"tuned", "target"},
    "sweep": {"data", "sweep"},
    "train": {"tuned", "data"},
    "tune-roles": {"tuned", "data", "roles"},
}
"""Commands that read a TOML file, and the tables of it that their help shows besides [base]."""


def test_one_file_holds_one_command() -> None:
    files = {path.stem for path in (ROOT / "src" / "mue" / "cli").glob("*.py")} - {
        "__init__",
        "app",
        "files",
        "measured_gates",
        "precision",
        "terminal",
        "user_model",
    }
    assert files == set(COMMANDS) and len(COMMANDS_BY_NAME) == len(COMMANDS) >= 12
    whole = {name: name.replace("-", "_") for name in COMMANDS_BY_NAME}
    assert {w if w in files else name.partition("-")[0] for name, w in whole.items()} == files


@pytest.mark.parametrize("name", [*COMMANDS_BY_NAME, "study run", "study report"])
def test_help_teaches(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what the command does, and of every argument and option what it is for."""
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = in_process(capsys, monkeypatch, *name.split(), "--help")
    group, _, inside = name.partition(" ")
    command = COMMANDS_BY_NAME[group].commands[inside] if inside else COMMANDS_BY_NAME[name]
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    assert code == 0
    assert len(command.help) > 20 and " ".join(command.help.split())[:20] in words
    if hasattr(command, "commands"):  # a group lists its commands, and each of them teaches itself
        assert all(" ".join(one.help.split())[:40] in words for one in command.commands.values()), name
        return
    assert command.params, name
    for parameter in command.params:
        assert parameter.help, f"{name}: {parameter.name} says nothing"
        assert " ".join(parameter.help.split())[:30] in words, parameter.name
        default = parameter.help.partition("[default")[2][
            :10
        ]  # in markup a name in brackets is a style, and is not shown
        assert not default or f"[default{default}" in words, parameter.name
        assert all(option in out for option in parameter.opts if option.startswith("--")), parameter.name


@pytest.mark.parametrize("name", WITH_A_FILE)
def test_the_help_holds_an_example_of_the_file(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is TOML as it is printed, so that it can be copied."""
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = in_process(capsys, monkeypatch, name, "--help")
    lines = [line.strip() for line in out.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("Example")) + 1
    example = "\n".join(lines[start : lines.index("", start)])
    tables = tomllib.loads(example)
    assert set(tables) >= {"base", *WITH_A_FILE[name]}
    assert tables["base"]["width"] > 0 and all(tables[table] for table in WITH_A_FILE[name])


def plugin(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package whose module has this code, for processes that are started."""
    made = folder / "theirs-1.0.dist-info"
    made.mkdir(parents=True)
    (folder / "theirs.py").write_text(code)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (made / "entry_points.txt").write_text("[mue.plugins]\ntheirs = theirs\n")
    path = os.pathsep.join(filter(None, (str(folder), str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)


TASK = """
from mue.lab.tasks.language import LanguageTask
from mue.lab.train.task import TASKS
TASKS.register("theirs")(LanguageTask)
"""


def test_the_help_names_what_other_packages_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, TASK, monkeypatch)
    told = " ".join(run("train", "--help").stdout.split())
    assert re.search(r'task = "language" \| [^,]*"theirs",', told)
    words = " ".join(re.sub("[│]", " ", run("plan", "--help").stdout).split())
    assert "instead of the file's: complete-mue, complete-mue-paper, " in words


def test_a_broken_package_breaks_only_what_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, "import no_such_module", monkeypatch)
    for command in ((), ("doctor",), ("export",)):
        assert run(*command, "--help").returncode == 0
    told = run("train", "--help")  # the negative control: the help that lists what packages registered
    refused((told.returncode, told.stdout, told.stderr), "the plugin theirs", "cannot be imported", "uninstall")
