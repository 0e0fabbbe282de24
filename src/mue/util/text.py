"""Numbers and tables as people read them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence


def number(value: float | None) -> str:
    """A number as tables and messages print it.

    Args:
        value: None where there is none.

    Returns:
        4 significant digits, as many as anybody compares by eye; ``–`` for None.
    """
    return "–" if value is None else f"{value:.4g}"


def yaml_number(value: float) -> str:
    """A number as YAML files have it, to the last bit.

    YAML 1.1, and with it PyYAML, takes ``2e-05`` for text: a number has a point, and a sign in its exponent.
    """
    digits, e, exponent = repr(float(value)).partition("e")
    return f"{digits if '.' in digits or not e else digits + '.0'}{e}{exponent}"


def percent(value: float) -> str:
    """Percents, with two digits below a hundred and whole from there: 100, where two digits make 1e+02."""
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


def below_one(value: float) -> str:
    """A number whose distance to 1 is what counts (Adam's betas), with three digits of that distance.

    Args:
        value: from 0 to 1. With as many digits as :func:`number` has, 0.99995 would be 1.
    """
    distance = 1 - value
    digits = max(4, 3 - math.floor(math.log10(distance)) - 1) if distance > 0 else 4
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], below: Sequence[Sequence[str]] = ()) -> str:
    """A table as plain text: left-aligned columns, two spaces apart, a rule under the header.

    Args:
        header: one cell a column. rows: as many cells each.
        below: rows of fewer cells, under a rule of their own; the last cell of each runs on over the columns that are left.
    """
    lines = [list(header), *map(list, rows)]
    columns = [[line[i] for line in lines] for i in range(len(header))]
    for line in below:
        for column, cell in zip(columns, line[:-1], strict=False):
            column.append(cell)
    widths = [max(map(len, column)) for column in columns]
    printed = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    under = ["  ".join([*map(str.ljust, line[:-1], widths), line[-1]]).rstrip() for line in below]
    rule = "  ".join("─" * width for width in widths)
    return "\n".join([printed[0], rule, *printed[1:], *([rule, *under] if under else [])])


def wrapped(start: str, value: str, width: int) -> str:
    """A line of at most ``width`` columns that goes on below its value; what has no blank in it stays whole.

    Args:
        start: what stands before the value on the first line. value: the text. width: in columns.
    """
    return textwrap.fill(
        value,
        width,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )
