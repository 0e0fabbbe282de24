"""The command on made-up files, from the paths to the pictures and the file of numbers."""

from __future__ import annotations

import json
import sys

import pytest

import public_runs
from public import analysis, slopes


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["public_runs.py", *map(str, arguments)])
    public_runs.main()


def test_from_files_to_numbers(made_up, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(slopes, "RESAMPLES", 40)
    monkeypatch.setattr(
        analysis, "second_opinion", lambda cells: list(cells)
    )  # its own tests are elsewhere, and it takes a minute
    monkeypatch.setattr(
        "public.figures.PANELS", (("dense", "d1024 L8"), ("dense", "d2048 L16"), ("moe", "1in8"), ("moe", "2in8"))
    )
    files = {
        kind: made_up(kind, lambda x: -10 + 0.5 * (x["B"] - 17) - 0.7 * (x["N"] - 28)) for kind in ("moe", "dense")
    }
    sums = [word for kind, (_, sha256) in files.items() for word in (f"--sha256-{kind}", sha256)]
    out = tmp_path / "out"
    out.mkdir()
    run(monkeypatch, files["moe"][0], files["dense"][0], *sums, "--json", out / "runs.json", "--figures", out)
    found = json.loads((out / "runs.json").read_text())
    assert found["sha256"] == {kind: sha256 for kind, (_, sha256) in files.items()}
    assert found["dense"]["exponents"]["all"]["terms"]["p"]["value"] == pytest.approx(0.5, abs=0.01)
    assert found["dense"]["size"]["by size"]["total"]["value"] == pytest.approx(-0.7, abs=0.01)
    said = capsys.readouterr().out
    assert (
        "dense: 150 runs" not in said
        and "dense: 510 runs, 30 of 30 cells" in said
        and "complete-mue, p = 0.5, q = 0 " in said
    )
    assert {path.name for path in out.iterdir()} == {"runs.json", "public-runs-surface.png", "public-runs-slopes.png"}


def test_an_unknown_file_writes_nothing(made_up, monkeypatch, tmp_path):
    files = [made_up(kind, lambda x: -10.0)[0] for kind in ("moe", "dense")]
    with pytest.raises(ValueError, match="its owner has changed it"):
        run(monkeypatch, *files, "--json", tmp_path / "runs.json")
    assert not (tmp_path / "runs.json").exists()
