"""Rich renderings for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mue.plan import Plan


def plan_table(plan: Plan, *, sources: bool = False) -> RenderableType:
    """A plan as its header lines and one row for each role; with ``sources``, where each row comes from."""
    facts = Table.grid(padding=(0, 2))
    for what, value in plan.header():
        facts.add_row(Text(what, style="dim"), Text(value))
    header, rows = plan.table()
    drop = set() if sources else {header.index("source"), header.index("× eps")}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(header):
        if i not in drop:
            table.add_column(name, overflow="fold", style="cyan" if i == 0 else "dim" if name.startswith("×") else "")
    for row in rows:
        table.add_row(*(Text(cell) for i, cell in enumerate(row) if i not in drop))
    return Group(facts, Text(""), table)
