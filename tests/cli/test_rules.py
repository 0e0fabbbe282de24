"""``mue rules``: a comparison, a derivation, a page, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mue.plan.rules_page import markdown
from support.plan_file import SHORT


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mue.cli import main

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mue", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    file = tmp_path / "moe.toml"
    file.write_text(SHORT)
    code, table, _ = command("rules", file)
    assert code == 0 and "complete-mue-paper" in table and "jiang" in table
    assert json.loads(command("rules", file, "--json")[1])["refused"]["mup"]
    steps = command("rules", file, "--why", "expert_down")[1]
    assert "ρ_e^1/2 = 3" in steps and "0.0106066" in steps
    assert json.loads(command("rules", file, "--why", "head", "--json")[1])[0]["number"] == "init std"
    assert command("rules", "--markdown")[1] == markdown()
    for arguments, message in (
        (("rules",), "needs a plan file"),
        (("rules", file, "--why", "expert_dow"), "did you mean 'expert_down'"),
        (("rules", tmp_path / "none.toml"), "does not exist"),
    ):
        code, out, err = command(*arguments)
        assert code == 2 and message in err and not out and err.count("\n") == 1
