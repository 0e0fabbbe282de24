"""A plan as a page: what a cell rests on is seen in every cell, and the pictures name what moves."""

from __future__ import annotations

import re
from pathlib import Path

import mue
from mue.lab.report.plan_page import LEGEND, axis_figure, pictures_section, plan_page, plan_sections, roles_in_words
from mue.plan.along import along
from mue.rules.table import FIELDS, MARKS
from support.plans import make
from support.sde import SDE


def test_the_plan_fits_its_page() -> None:
    """Ten columns of values and formulas are wider than a page: sources stood beyond its edge."""
    plan = make(**SDE)
    values, factors = plan_sections(plan)
    assert values.header == ["role", "tensors", "init std", "lr", "weight decay", "eps", "source"]
    # what cannot wrap: about 7 px a character at 13 px and 24 px of padding a column, in the 990 px of the page
    for section in (values, factors):
        fixed = [i for i in range(len(section.header)) if i not in section.wrap]
        widest = [max(len(row[i]) for row in [section.header, *section.rows]) for i in fixed]
        assert sum(7 * w + 24 for w in widest) + 260 < 990, widest
    full, rows = plan.table()
    formulas = {row[full.index(name)] for row in rows for name in full if name.startswith("×")} - {"–"}
    assert {row[1] for row in factors.rows} == formulas


def test_every_cell_says_what_it_rests_on(tmp_path: Path) -> None:
    """By a letter beside the colour, and in the page itself: a class for each marked cell of the plan, no other."""
    plan = make(rule="complete-mue-paper")
    html = plan_page(plan, tmp_path / "of" / "plan.html").read_text(encoding="utf-8")
    letters = {tag: MARKS[mark] for tag, (mark, _) in LEGEND.items()}
    found = re.findall(r'<td class="(\w+)" data-mark="(.)" data-label="([\w ]+)">', html)
    marks = [mark for r in plan.roles.values() if r.count for f in FIELDS if (mark := r.marks.get(f))]
    assert sorted(letter for _, letter, _ in found) == sorted(MARKS[mark] for mark in marks)
    assert {letters[tag] for tag, *_ in found} == {letter for _, letter, _ in found} and len(set(marks)) > 1
    assert "<svg" in html and not re.search(r'(src|href)="(?!#)', html)  # nothing is asked of another server


def test_pictures_are_of_what_moves() -> None:
    section = pictures_section(make())
    assert [p.caption.partition(",")[0] for p in section.panels] == [
        "Width",
        "Depth",
        "Active experts of each token",
        "Tokens of a step",
    ]
    assert any("No value moves with experts or duration" in t["text"] for t in section.texts)
    refused = pictures_section(make(rule="mup", target=mue.Dense(256, 256, 8), base_training=None, training=None))
    assert any(t["warn"] and "along depth" in t["text"] for t in refused.texts)
    assert any("no training tables" in t["text"] for t in refused.texts) and len(refused.panels) == 1


def test_roles_are_named_by_their_kind_where_all_of_it_is_there() -> None:
    width = next(axis for axis in along(make()) if axis.name == "width")
    drawn = axis_figure(width)
    shown = [t.get_text().replace("\n", " ") for t in drawn.legends[0].get_texts()]
    assert "lr of attention, expert, shared, router" in shown and "init std of expert down, shared down" in shown
    assert roles_in_words(["attention_q", "attention_k"], width.curves) == "attention q/k"
