"""docs/start/own-model.md: 60 lines, and the check on them that sees a wrong one. (tests/docs run the code of every page.)"""

from __future__ import annotations

import pytest

from support.pages import fences
from support.paths import ROOT

PAGE = (ROOT / "docs" / "start" / "own-model.md").read_text(encoding="utf-8")
CODE = "".join(code for _, code in fences(PAGE.partition("## Multipliers")[0], "python"))


def test_your_own_model_takes_60_lines() -> None:
    """From the first import to the resumed run."""
    lines = [line for line in CODE.splitlines() if line.strip()]
    assert 40 < len(lines) <= 60, len(lines)
    for word in ("mue.transfer(", "def layout(", "mue.fold.fold(", "mue.check(", "torch.load("):
        assert word in CODE


def test_a_wrong_row_on_the_page_would_be_seen() -> None:
    """Negative control: that the page runs says that its rows are right."""
    wrong = CODE.replace('"expert_down", ("expert", "out", "in")', '"expert_down", ("expert", "in", "out")')
    assert wrong != CODE
    with pytest.raises(ValueError, match="hidden width 64, planned 128"):
        exec(compile(wrong, "own-model.md", "exec"), {"__name__": "page"})
