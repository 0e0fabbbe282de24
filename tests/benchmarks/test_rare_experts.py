"""Weights of experts that rarely get a gradient: torch's AdamW beside the formula of docs/rare-experts.md, and the page's table."""

from __future__ import annotations

import re
import sys

import pytest

from support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from rare_experts import SHARES, expected, settled

PAGE = (ROOT / "docs" / "rare-experts.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("f", [1.0, 0.05, 0.01])
def test_adamw_settles_where_the_formula_says(f: float) -> None:
    """Steps ten times as fast as the page's, so that they are a tenth as many: betas count in steps, which costs some of the agreement."""
    assert settled(f, lr=0.05, decay=0.2, elements=400) == pytest.approx(expected(f, 0.05, 0.2), rel=0.12)


def test_an_absent_gradient_is_no_step_and_a_zero_one_is() -> None:
    zero, absent = (settled(0.05, absent=a, lr=0.05, decay=0.2, elements=400) for a in (False, True))
    assert absent == pytest.approx(expected(1.0, 0.05, 0.2), rel=0.12) and zero < 0.85 * absent


def test_the_pages_table_is_the_formulas() -> None:
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", PAGE, flags=re.M)
    assert [float(f) for f, _, _ in rows] == list(SHARES)
    for f, measured, formula in rows:
        assert float(formula) == pytest.approx(expected(float(f)), abs=6e-4)
        assert float(measured) == pytest.approx(float(formula), rel=0.03)
    assert pytest.approx(0.0098, abs=1e-4) == 1 / (3 * 34) and expected(1 / (3 * 34.1)) == pytest.approx(
        0.5 * 0.2236, rel=0.01
    )
