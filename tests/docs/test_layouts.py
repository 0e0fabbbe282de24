"""docs/layouts.md names every role and every axis that a row may have."""

from __future__ import annotations

from mue.layouts.layout import AXES, LAYOUT_ROLES
from support.paths import ROOT

PAGE = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")


def test_every_role_and_axis_is_on_the_page() -> None:
    assert [word for word in (*LAYOUT_ROLES, *AXES) if f"`{word}`" not in PAGE] == []
