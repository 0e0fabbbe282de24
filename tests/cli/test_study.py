"""``mue study``: what it would train, by its file or the package's own, with other values where ``--set`` says them."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command_line import in_process, refused
from support.study import STUDY


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(f"the quick brown fox number {i} jumps\n" for i in range(4000)))
    return folder


def runs(found: tuple[int, str, str]) -> int:
    code, out, err = found
    assert code == 0, err
    return int(next(line for line in out.splitlines() if "runs to train" in line).split()[0])


def test_set_changes_a_study(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    said = ("study", tmp_path / "study.toml", "-o", tmp_path / "s", "--dry-run")
    both = runs(in_process(capsys, monkeypatch, *said))
    one = runs(in_process(capsys, monkeypatch, *said, "--set", "study.seeds=[0]"))
    assert both == 2 * one > 0
    refused(in_process(capsys, monkeypatch, *said, "--set", "study.sedes=[0]"), "unknown key 'sedes'", "seeds")
    refused(in_process(capsys, monkeypatch, *said, "--set", "target.width=64"), "target")
    assert not (tmp_path / "s").exists()


def test_set_changes_the_study_that_comes_with_the_package(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ("study", "--small", "-o", tmp_path / "s", "--dry-run", "--set", f"data.source='{texts}'")
    both = runs(in_process(capsys, monkeypatch, *said))
    one = runs(in_process(capsys, monkeypatch, *said, "--set", "study.seeds=[0]"))
    assert 0 < one < both
