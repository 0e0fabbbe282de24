"""Numbers and tables as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def number(value: float | None) -> str:
    """A number as tables print it: 4 significant digits, ``–`` for none."""
    return "–" if value is None else f"{value:.4g}"


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart, a rule under the header."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    printed = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    return "\n".join([printed[0], "  ".join("─" * width for width in widths), *printed[1:]])
