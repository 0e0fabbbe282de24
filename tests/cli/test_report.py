"""``mue report`` of what is no run and no sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command_line import in_process, refused


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    refused(in_process(capsys, monkeypatch, "report", tmp_path), "neither")
