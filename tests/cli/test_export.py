"""``mue export``: what the terminal says of the file is what stands in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mue.export import STACKS
from mue.plan.fold import fold
from support.command_line import in_process
from support.plans import make


@pytest.mark.parametrize("to", STACKS)
def test_terminal_and_file_name_one_plan(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the plan was folded before; whose values the file has is said beside it."""
    plan = make()
    for saved in (plan, fold(plan)):
        file, out = tmp_path / "plan.json", tmp_path / "out"
        saved.save(file)
        code, said, err = in_process(capsys, monkeypatch, "export", file, "--to", to, "-o", out)
        assert code == 0, err
        head = out.read_text()[:1500]
        assert f"plan {plan.hash} for {to}" in said and f"hyperparameters of plan {plan.hash} (" in head
        assert "itself plan " in head and plan.hash not in head.partition("itself plan ")[2][:16]
