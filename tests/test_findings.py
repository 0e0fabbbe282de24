"""The pages of findings quote what was measured: every number of a table marked as a study's is computed again from the study's rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from findings_tables import FOLDER, MARKED, Cells, measured, rewritten
from support.paths import ROOT

PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if MARKED.search(p.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def cells() -> Cells:
    return measured()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_table_says_what_the_rows_say(page: Path, cells: Cells) -> None:
    """Run ``python benchmarks/findings_tables.py`` after new rows."""
    text = page.read_text(encoding="utf-8")
    assert rewritten(text, cells) == text
    rows = MARKED.findall(text)[0][3].split("\n", 2)[2]
    other = rows.replace(next(n for n in rows.split() if n[:2] in ("0.", "1.")), "1.999", 1)
    assert rewritten(text.replace(rows, other), cells) == text  # another number would be seen


def test_a_table_of_targets_or_columns_that_are_not_there_is_named(cells: Cells) -> None:
    table = "<!-- study width: standard@1 -->\n| target | standard |\n|---|---|\n| {} |\n<!-- /study -->"
    with pytest.raises(ValueError, match="no target 'width 65, ffn 65'"):
        rewritten(table.format("width 65, ffn 65 | 1.0"), cells)
    with pytest.raises(ValueError, match="2 numbers for 1 columns"):
        rewritten(table.format("width 64, ffn 64 | 1.0 | 2.0"), cells)


def test_there_are_such_pages_and_the_rows_are_whole() -> None:
    assert {"horizon", "transfer"} <= {p.stem for p in PAGES}
    rows = FOLDER.rows()
    assert len(rows) >= 60 and all(row["val_loss"] is None or 0 < row["val_loss"] < 6 for row in rows.values())
