"""A derivation as data: one step after another, each with its value and its source. What is derived: explain, laws."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from mue.util.text import text_table


@dataclass(frozen=True)
class Step:
    """One step of a derivation: of which number, what happens, the value after it (None where there is none), and the source."""

    number: str
    text: str
    value: float | None
    source: str

    @property
    def shown(self) -> str:
        """The value with the six digits that a derivation is checked to."""
        return "–" if self.value is None else f"{self.value:.6g}"


Steps = Generator[Step, None, float]


def why_lines(name: str, steps: Sequence[Step]) -> str:
    """A derivation as plain text, one line per step.

    Args:
        name: what was derived; the title. steps: of :func:`why`.
    """
    rows = [[s.number, s.text, s.shown, s.source] for s in steps]
    return f"{name}\n\n{text_table(['number', 'step', 'value', 'source'], rows)}"
