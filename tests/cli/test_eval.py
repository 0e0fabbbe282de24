"""``mue eval``: tables and JSON, other numbers of active experts with their picture, and one line for what cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.command_line import in_process, refused
from support.trained import moe_run_of_bytes


@pytest.fixture(scope="module")
def moe(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_run_of_bytes(texts, tmp_path_factory.mktemp("moe"))


def test_losses_as_a_table_and_as_json(
    moe: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("MUE_CACHE", str(tmp_path / "cache"))
    before = sorted(p.name for p in moe.iterdir())
    code, out, err = in_process(capsys, monkeypatch, "eval", moe)
    assert code == 0, err
    assert "nats per byte" in out and "next token right" in out and " ± " in out
    data = tmp_path / "data"
    for name, files in {"one": ("ast.py", "bdb.py"), "two": ("dis.py",)}.items():
        (data / name).mkdir(parents=True)
        for file in files:
            shutil.copy(texts / file, data / name / file)
    code, out, err = in_process(capsys, monkeypatch, "eval", moe, "--data", data, "--json", "--sequences", "16")
    assert code == 0, err
    found = json.loads(out)
    assert list(found["scores"]) == ["all", "one", "two"] and found["left_out"] == {}
    value, low, high = found["scores"]["all"]["nats_per_byte"]
    assert low < value < high and found["scores"]["one"]["sequences"] <= 5
    assert sorted(p.name for p in moe.iterdir()) == before  # nothing is left where nothing was asked for


def test_another_number_of_experts(
    moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--active`` alone is 1 to 3k, wherever it stands; the picture and its numbers land where they are asked for."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    # RUN may also be the beginning of a key, which is no path
    begun = moe.parent.parent / moe.name[:6]
    code, said, err = in_process(capsys, monkeypatch, "eval", "--active", begun, "-o", out, "--sequences", "4")
    assert code == 0, err
    rows = [line.split() for line in said.splitlines() if line.split() and line.split()[0].isdigit()]
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[1][2] == "1.00" and "Δ root" in said and "Δ mean" in said
    assert (out / "active.png").read_bytes()[1:4] == b"PNG"
    code, said, err = in_process(
        capsys, monkeypatch, "eval", moe, "--active", "2,8", "--scale", "sum", "--json", "--sequences", "4", "-o", out
    )
    assert code == 0, err
    found = json.loads(said)
    assert [(p["active"], p["scale"]) for p in found["points"]] == [(2, "sum"), (8, "sum")]
    assert found["points"][0]["above_trained"][0] == 0 and found == json.loads((out / "active.json").read_text())


def test_what_cannot_be_is_one_line_and_leaves_nothing(
    moe: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stock = tmp_path / "stock"
    stock.mkdir()
    (stock / "config.json").write_text('{"model_type": "qwen3_mow"}')
    bare = tmp_path / "bare" / "runs" / moe.name
    shutil.copytree(moe, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    for words, arguments in {
        ("can use 1 to 8", "not 9"): (moe, "--active", "1..9", "-o", out),
        ("write a range",): (moe, "--active", "lots", "-o", out),
        ("'meen'", "did you mean 'mean'"): (moe, "--active", "1..2", "--scale", "meen", "-o", out),
        ("--scale", "--active"): (moe, "--scale", "mean"),
        ("--out", "--active"): (moe, "-o", out),
        ("keeps no weights",): (bare,),
        ("no such file or folder",): (moe, "--data", tmp_path / "nowhere"),
        ("give --data",): (stock,),
        ("did you mean 'qwen3_moe'",): (stock, "--data", texts),
        ("does not exist",): (tmp_path / "nothing",),
    }.items():
        refused(in_process(capsys, monkeypatch, "eval", *arguments), *words)
    assert not out.exists() and not (bare / "active.png").exists()
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    refused(in_process(capsys, monkeypatch, "eval", stock, "--data", texts), "mue[hf]")
