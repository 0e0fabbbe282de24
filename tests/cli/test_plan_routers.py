"""``mue plan`` with routers that have settings: from an ordinary file to a plan, and every mistake one line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mue
from support.command_line import in_process, refused

FILE = """
[base]
width = 32
ffn = 32
layers = 2
head_dim = 16
[tuned]
lr = 0.01
weight_decay = 0.1
init_std = 0.1
[target]
width = 64
layers = 2
head_dim = 16
expert = 32
moe = "{moe}"
{rest}
"""


def written(tmp_path: Path, rest: str, moe: str = "16e4a") -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(FILE.format(moe=moe, rest=rest))
    return path


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("top-p", "p = 0.3"),
        ("dtop-p", 'control = "layer"'),
        ("elastic", "pool = 6"),
        ("dynamoe", "percentile = 60"),
        ("group-limited", "n_group = 4\ntopk_group = 2"),
    ],
)
def test_a_plan_of_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, settings: str
) -> None:
    """By its name, and by a table with a setting, which is in the plan's hash and comes back from its file."""
    hashes = []
    for rest in (f'router = "{name}"', f'[target.router]\nname = "{name}"\n{settings}'):
        path, saved = written(tmp_path, rest), tmp_path / "plan.json"
        code, out, _ = in_process(capsys, monkeypatch, "plan", path, "--json", "--save", saved)
        assert code == 0
        again = mue.Plan.load(saved)
        assert again.hash == json.loads(out)["hash"] and again.target.blocks[0].router == name
        hashes.append(again.hash)
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    ("moe", "rest", "words"),
    [
        ("16e4a", '[target.router]\nname = "top-p"\np = 0.0', ("p of the top-p router must be a number above 0",)),
        ("16e4a", '[target.router]\nname = "top-p"\np = 1.2', ("p of the top-p router", "at most 1")),
        ("8e9a", 'router = "dtop-p"', ("9 active of 8 experts",)),
        ("16e4a", '[target.router]\nname = "elastic"\npool = 17', ("pool = 17", "16 experts")),
        ("16e9a", 'router = "dynamoe"', ("of 16 experts 8 pass it", "fewer than 9 active")),
        ("12e4a", 'router = "group-limited"', ("n_group = 8", "12 experts")),
        ("16e4a", 'router = "topp"', ("unknown router 'topp'", "did you mean 'top-p'")),
        ("16e4a", '[target.router]\nname = "dtop-p"\nintegrl = 1', ("no setting 'integrl'", "did you mean 'integral'")),
        ("16e4a", 'router = "dynamoe"\nschedule = "pyramide"', ("unknown schedule 'pyramide'", "did you mean 'pyramid'")),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    moe: str, rest: str, words: tuple[str, ...],
) -> None:  # fmt: skip
    path, saved = written(tmp_path, rest, moe), tmp_path / "plan.json"
    refused(in_process(capsys, monkeypatch, "plan", path, "--save", saved), *words)
    assert not saved.exists()
