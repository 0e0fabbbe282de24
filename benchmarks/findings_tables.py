"""Write the tables of docs/findings, and the picture of docs/images/study.png, again from the rows of a study.

    python benchmarks/findings_tables.py            # all pages under docs

A table between ``<!-- study AXES: APPROACH@MULTIPLIER, … -->`` and ``<!-- /study -->`` has a target in its first column and the mean loss over
seeds in the others. Its words are the page's own; its numbers come from docs/results/study/rows.jsonl, and a test compares them. Axes of the
studies in benchmarks/studies have the file's name before theirs (``natural/width``) and their rows in docs/results under that name.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mue.lab.study.figures import colors, headline_figure
from mue.lab.study.measure import CellMeasures, measure
from mue.lab.study.rows import StudyFolder
from mue.lab.study.schedule import Schedule
from mue.lab.study.shipped import shipped_study
from mue.lab.study.spec import study_from
from mue.util.files import write_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
STUDIES = ROOT / "benchmarks" / "studies"
FOLDER = StudyFolder(RESULTS / "study")
MARKED = re.compile(r"(<!-- study ([^:]*): (.*?) -->\n)(.*?)(<!-- /study -->)", re.DOTALL)
COLUMN = re.compile(r"([^@]+)@([\d.]+)(?:, |$)")
NONE = "–"
Cells = Mapping[tuple[str, str, str], CellMeasures]


def measured() -> Cells:
    """Every cell of the committed studies, by axis, target and approach."""
    house = shipped_study(small=False, cache=Path("cache"))
    found = dict(_cells(house, FOLDER))
    for folder in sorted(RESULTS.glob("*/study.json")):
        name = folder.parent.name
        if folder.parent != FOLDER.root:
            # the rows alone are read, and the data, text or images, need not be here
            asked = tomllib.loads((STUDIES / f"{name}.toml").read_text(encoding="utf-8")) | {"data": {"source": "data"}}
            cells = _cells(asked, StudyFolder(folder.parent))
            found |= {(f"{name}/{axis}", target, approach): m for (axis, target, approach), m in cells}
    return found


def _cells(asked: Mapping[str, Any], folder: StudyFolder) -> Iterator[tuple[tuple[str, str, str], CellMeasures]]:
    schedule = Schedule(study_from(asked, Path()), folder.asked()["data"])
    for m in measure(schedule, folder.rows()):
        yield (m.cell.target.axis, m.cell.target.name, m.cell.approach.name), m


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
    return NONE if math.isnan(mean) else "diverged" if math.isinf(mean) else f"{mean:#.4g}"


def picture(cells: Cells) -> None:
    """The losses at transferred values on the axes where a model grows, by the approaches that anybody could take."""
    axes = ("width", "depth", "dense to MoE", "all at once")
    approaches = ("complete-mue", "hidden-ratio-only", "standard")
    shown = [m for (axis, _, approach), m in cells.items() if axis in axes and approach in approaches]
    headline_figure(shown, axes, colors(approaches)).savefig(ROOT / "docs" / "images" / "study.png", dpi=110)


def main() -> None:
    cells = measured()
    picture(cells)
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text, cells)) != text:
            write_text(page, new)
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
