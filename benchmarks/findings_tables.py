"""Write the tables of docs/findings again from the rows of a study.

    python benchmarks/findings_tables.py            # all pages under docs

A table between ``<!-- study AXES: APPROACH@MULTIPLIER, … -->`` and ``<!-- /study -->`` has a target in its first column and the mean loss over
seeds in the others. Its words are the page's own; its numbers come from docs/results/study/rows.jsonl, and a test compares them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from mue.lab.study.measure import CellMeasures, measure
from mue.lab.study.rows import StudyFolder
from mue.lab.study.schedule import Schedule
from mue.lab.study.shipped import shipped_study
from mue.lab.study.spec import study_from
from mue.util.files import write_text

ROOT = Path(__file__).parent.parent
FOLDER = StudyFolder(ROOT / "docs" / "results" / "study")
MARKED = re.compile(r"(<!-- study ([^:]*): (.*?) -->\n)(.*?)(<!-- /study -->)", re.DOTALL)
COLUMN = re.compile(r"([^@]+)@([\d.]+)(?:, |$)")
NONE = "–"
Cells = Mapping[tuple[str, str, str], CellMeasures]


def measured() -> Cells:
    """Every cell of the study that comes with the package, by axis, target and approach, from the committed rows."""
    spec = study_from(shipped_study(small=False, cache=Path("cache")), Path())
    cells = measure(Schedule(spec, FOLDER.asked()["data"]), FOLDER.rows())
    return {(m.cell.target.axis, m.cell.target.name, m.cell.approach.name): m for m in cells}


def rewritten(text: str, cells: Cells) -> str:
    """A page with the numbers of its tables as the rows have them.

    Raises:
        ValueError: a target or an approach that the study does not have, or in several of the axes named.
    """
    return MARKED.sub(lambda m: m[1] + _table(m[4], m[2].split("; "), COLUMN.findall(m[3]), cells) + m[5], text)


def _table(table: str, axes: list[str], columns: list[tuple[str, str]], cells: Cells) -> str:
    head, rows = table.splitlines()[:2], table.splitlines()[2:]
    out = []
    for row in rows:
        target, *old = (cell.strip() for cell in row.strip("|").split("|"))
        if len(old) != len(columns):
            raise ValueError(f"a row of {len(old)} numbers for {len(columns)} columns: {row}")
        values = [_value(cells, axes, target, approach, float(m)) for approach, m in columns]
        bold = ("**" if cell.startswith("**") else "" for cell in old)
        out.append("| " + " | ".join([target, *(f"{b}{v}{b}" for b, v in zip(bold, values, strict=True))]) + " |")
    return "\n".join([*head, *out, ""])


def _value(cells: Cells, axes: list[str], target: str, approach: str, multiplier: float) -> str:
    found = [cells[axis, target, approach] for axis in axes if (axis, target, approach) in cells]
    if not found and not any((axis, target) == key[:2] for axis in axes for key in cells):
        raise ValueError(f"no target {target!r} on the axes {', '.join(axes)}")
    losses = {tuple(sorted(m.losses[multiplier].items())) for m in found if multiplier in m.losses}
    if len(losses) > 1:
        raise ValueError(f"{target}, {approach} stands on several of the axes {', '.join(axes)}: name one")
    (one,) = losses or {()}
    mean = math.fsum(loss for _, loss in one) / len(one) if one else math.nan
    return NONE if math.isnan(mean) else "diverged" if math.isinf(mean) else f"{mean:.3f}"


def main() -> None:
    cells = measured()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text, cells)) != text:
            write_text(page, new)
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
