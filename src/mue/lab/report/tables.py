"""Rich renderings for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mue.plan import render
from mue.plan.plan import PlanData

WIDE = 150  # columns that the formulas need


def plan_table(plan: PlanData, *, width: int = 80, sources: bool = False) -> RenderableType:
    """A plan as its header lines and one row for each role.

    ``mue plan --json`` has everything at any width.

    Args:
        width: columns of the terminal; from :data:`WIDE` on the factors are shown as formulas as well.
        sources: add where each row comes from.
    """
    facts = Table.grid(padding=(0, 2))
    for what, value in render.header(plan):
        facts.add_row(Text(what, style="dim"), Text(value))
    header, rows = render.table(plan)
    dropped = {"× eps"} | (set() if sources else {"source"})
    if width < WIDE:
        dropped |= {name for name in header if name.startswith("×")} | {"marks"}
    kept = [i for i, name in enumerate(header) if name not in dropped]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i in kept:
        numeric = 0 < i < header.index("× std")
        style = "cyan" if i == 0 else "" if numeric else "dim"
        whole = max(len(row[i]) for row in rows) if numeric else None  # a number is shown whole, or it is wrong
        table.add_column(
            header[i], style=style, justify="right" if numeric else "left", min_width=whole, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(row[i]) for i in kept))
    return Group(facts, Text(""), table)
