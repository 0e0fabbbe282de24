"""The pages of findings quote what was measured: every number of a table marked as a study's is computed again from the study's rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mue.lab.study.measure import CellMeasures, measure
from mue.lab.study.rows import StudyFolder
from mue.lab.study.schedule import Schedule
from mue.lab.study.shipped import shipped_study
from mue.lab.study.spec import study_from
from support.paths import ROOT

FOLDER = StudyFolder(ROOT / "docs" / "results" / "study")
MARKED = re.compile(r"<!-- study ([^:]*): (.*?) -->\n(.*?)<!-- /study -->", re.DOTALL)
PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if MARKED.search(p.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], CellMeasures]:
    """By axis, target and approach, of the study as it is shipped."""
    spec = study_from(shipped_study(small=False, cache=tmp_path_factory.mktemp("cache")), Path())
    measured = measure(Schedule(spec, FOLDER.asked()["data"]), FOLDER.rows())
    return {(m.cell.target.axis, m.cell.target.name, m.cell.approach.name): m for m in measured}


def mean(cells: dict[tuple[str, str, str], CellMeasures], axes: list[str], target: str, column: str) -> float:
    """Of the runs of a cell at a multiplier; ``column`` is ``approach@multiplier``."""
    approach, _, multiplier = column.rpartition("@")
    (one,) = [cells[axis, target, approach] for axis in axes if (axis, target, approach) in cells]
    losses = one.losses[float(multiplier)]
    return sum(losses.values()) / len(losses)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_table_says_what_the_rows_say(page: Path, cells: dict[tuple[str, str, str], CellMeasures]) -> None:
    seen = 0
    for axes, columns, table in MARKED.findall(page.read_text(encoding="utf-8")):
        names = re.findall(r"[^@]+@[\d.]+", columns)
        named = [name.strip(" ,") for name in names]
        known = {axis for axis, _, _ in cells}
        these = [axis for axis in known if axis in axes]
        for line in table.strip().splitlines()[2:]:
            target, *values = (cell.strip(" *") for cell in line.strip("|").split("|"))
            for column, value in zip(named, values, strict=True):
                if value not in ("", "–"):
                    assert float(value) == pytest.approx(mean(cells, these, target, column), abs=0.00051), (
                        target,
                        column,
                    )
                    seen += 1
    assert seen >= 5


def test_there_are_such_pages_and_the_rows_are_whole() -> None:
    assert {"horizon"} <= {p.stem for p in PAGES}
    rows = FOLDER.rows()
    assert len(rows) >= 60 and all(row["val_loss"] is None or 0 < row["val_loss"] < 6 for row in rows.values())
