"""mue.plan.toml_edit: keys are written where they belong, or nowhere."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mue.plan.toml_edit import write_keys

FILE = """# mine
[base]
width = 32  # tuned
[target]  # big
moe = "8e2a"
gates = "unit-sum"
layers = 4
[target.training]
batch = 64
gates = 1
"""


def test_keys_are_written_and_all_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(FILE)
    for moments in ("[0.5, 0.25]", "[[0.5, 0.25], [0.5, 0.3]]"):
        write_keys(path, "[target]", {0: {"gates": '"measured"', "gate_moments": moments}})
        text = path.read_text()
        assert tomllib.loads(text)["target"]["gate_moments"] == tomllib.loads(f"x = {moments}")["x"]
        written = f'[target]  # big\ngates = "measured"\ngate_moments = {moments}\nmoe'
        assert text == FILE.replace('gates = "unit-sum"\n', "").replace("[target]  # big\nmoe", written)


def test_of_several_tables_those_that_are_meant(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        "[[target.blocks]]\na = 1\n[[target.blocks]]\na = 2\n[target.blocks.router]\na = 3\n[[target.blocks]]\na = 4"
    )
    write_keys(path, "[[target.blocks]]", {1: {"a": "5"}, 2: {"b": "6"}})
    assert tomllib.loads(path.read_text())["target"]["blocks"] == [
        {"a": 1},
        {"a": 5, "router": {"a": 3}},
        {"a": 4, "b": 6},
    ]


@pytest.mark.parametrize(
    "text",
    [
        'target = { moe = "8e2a" }\n',  # no header
        'target.moe = "8e2a"\n',
        "[target]\ngate_moments = [\n  1.0,\n  0.5,\n]\n",  # of several lines
        '[target]\n"gate_moments" = [1.0, 0.5]\n',
    ],
)
def test_another_form_is_refused_with_the_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"write them yourself: gate_moments = \[0\.5, 0\.25\]"):
        write_keys(path, "[target]", {0: {"gate_moments": "[0.5, 0.25]"}})
    assert path.read_text() == text and [p.name for p in tmp_path.iterdir()] == ["a.toml"]
