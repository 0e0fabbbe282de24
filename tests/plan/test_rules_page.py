"""docs/rules.md: every row of every rule with its source, and the page as the tables say."""

from __future__ import annotations

import pytest

import mue
from mue.plan.compare import formulas
from mue.plan.rules_page import markdown
from mue.rules.roles import ROLES
from support.paths import ROOT


@pytest.mark.parametrize("rule", list(mue.RULES))
def test_every_row_has_a_source_and_a_mark(rule: str) -> None:
    the_rule = mue.get_rule(rule).for_roles(ROLES.values())
    for role, row in the_rule.rows.items():
        assert len(row.source) > 10 and row.status in ("published", "authors' code", "inferred"), role
    covered = [role for line in formulas(the_rule) for role in line[0].split(", ")]
    assert sorted(covered) == sorted(role for role in the_rule.rows if ROLES[role].trained)
    text = f"{the_rule.source} {' '.join(row.source for row in the_rule.rows.values())}"
    assert rule in ("standard", "hidden-ratio-only") or any(c.isdigit() for c in text)


def test_the_page_is_fresh() -> None:
    """docs/rules.md is what the tables say: write it again with ``mue rules --markdown > docs/rules.md``."""
    assert (ROOT / "docs" / "rules.md").read_text(encoding="utf-8") == markdown()
    for rule in mue.RULES:
        assert f"\n## {rule}\n" in markdown()
