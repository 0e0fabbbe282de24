"""``mue plan FILE --measure-gates``: what it writes, and that nothing is written where something is wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from support.command_line import in_process, refused, run

FILE = """# a raw softmax
[base]
width = 32
ffn = 32
layers = 2
head_dim = 16
sequence = 32
[tuned]
lr = 8e-3
weight_decay = 0.1
init_std = 0.1
[target]  # what I want
moe = "8e2a"
width = 32
expert = 32
layers = 2
head_dim = 16
sequence = 32
router = "softmax"
normalize = false
[data]
source = "texts"
"""


@pytest.fixture
def file(tmp_path: Path, texts: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(FILE.replace('"texts"', f'"{texts}"'))
    return path


def test_the_error_names_it_and_it_mends_the_file(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_text()
    refused(in_process(capsys, monkeypatch, "plan", file), "mue plan FILE --measure-gates")
    done = run("plan", file, "--measure-gates")
    assert done.returncode == 0, done.stderr
    assert f"Written into {file}" in done.stderr and "m1 = E[Σw]" in done.stderr and "(measured)" in done.stdout
    table = tomllib.loads(file.read_text())["target"]
    m1, m2 = table["gate_moments"] if isinstance(table["gate_moments"][0], float) else table["gate_moments"][0]
    assert table["gates"] == "measured" and 0.25 < m1 < 0.5 and m1 * m1 / 2 <= m2 < m1 * m1
    kept = [line for line in file.read_text().splitlines() if not line.startswith("gate")]
    assert kept == before.splitlines()
    code, _, err = in_process(capsys, monkeypatch, "plan", file)
    assert code == 0, err


def test_nothing_is_written_where_something_is_wrong(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*more: str) -> tuple[int, str, str]:
        return in_process(capsys, monkeypatch, "plan", file, "--measure-gates", *more)

    before = file.read_text()
    refused(plan("--set", "target.width=64"), "leave --set and --rule out")
    for old, new, word in (
        ("[data]", "[dat]", "unknown key 'dat'"),
        (before[before.index("[data]") :], "", "needs a [data] table"),
        ('"softmax"', '"sofmax"', "did you mean 'softmax'"),
        ("8e2a", "8e9a", "9 active of 8"),
        ("head_dim = 16\nsequence = 32\nrouter", "head_dim = 16\nsequence = 32\nvocab = 9\nrouter", "vocabulary of 9"),
    ):
        wrong = before.replace(old, new)
        assert wrong != before
        file.write_text(wrong)
        refused(plan(), word)
        assert file.read_text() == wrong
    file.write_text(before.replace("normalize = false\n", ""))
    code, _, err = plan()
    assert code == 0 and "nothing is written" in err and file.read_text() == before.replace("normalize = false\n", "")
