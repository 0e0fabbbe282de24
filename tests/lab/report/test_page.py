"""The sections of a report's page."""

from __future__ import annotations

from mue.lab.report.page import plan_sections
from support.plans import make
from support.sde import SDE


def test_the_plan_fits_its_page() -> None:
    """Ten columns of values and formulas are wider than a page: marks and sources stood beyond its edge."""
    plan = make(**SDE)
    values, factors = plan_sections(plan)
    assert values.header == ["role", "tensors", "init std", "lr", "weight decay", "eps", "marks", "source"]
    # what cannot wrap: about 7 px a character at 13 px and 24 px of padding a column, in the 990 px of the page
    for section in (values, factors):
        fixed = [i for i in range(len(section.header)) if i not in section.wrap]
        widest = [max(len(row[i]) for row in [section.header, *section.rows]) for i in fixed]
        assert sum(7 * w + 24 for w in widest) + 260 < 990, widest
    full, rows = plan.table()
    formulas = {row[full.index(name)] for row in rows for name in full if name.startswith("×")} - {"–"}
    assert {row[1] for row in factors.rows} == formulas
