"""Which runs a study still needs, in the order in which they tell most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mue.lab.study.spec import StudyCell, StudySpec, octave
from mue.lab.train.run import Run

Rows = Mapping[str, Mapping[str, Any]]
"""Rows of runs that ended, by key."""


@dataclass(frozen=True)
class Planned:
    """A run of a study, and what for."""

    cell: StudyCell
    multiplier: float
    seed: int
    run: Run

    @property
    def name(self) -> str:
        """What people call it."""
        target = self.cell.target
        return f"{target.axis}: {target.name}, {self.cell.approach.name} × {self.multiplier:g} seed {self.seed}"


class Schedule:
    """The cells of a study and their runs, each planned once.

    Args:
        data: as a run keeps it (:func:`mue.lab.data.spec.describe_data`).
    """

    def __init__(self, spec: StudySpec, data: dict[str, Any]) -> None:
        self.spec, self.data = spec, data
        self.cells = tuple(spec.cells())
        self._runs: dict[tuple[int, float, int], Planned] = {}

    def missing(self, rows: Rows) -> list[Planned]:
        """What is to be trained now: each key once, the transferred values of all cells first, for they are what a user gets.

        Args:
            rows: what has been trained. As rows come in, further runs follow where the lowest lies at an end.
        """
        wanted = [(i, p) for i, cell in enumerate(self.cells) if cell.plan is not None for p in self.runs_of(i, rows)]
        wanted.sort(key=lambda w: (abs(octave(w[1].multiplier)), w[1].multiplier, w[0], w[1].seed))
        first: dict[str, Planned] = {}
        for _, planned in wanted:
            if planned.run.key not in rows:
                first.setdefault(planned.run.key, planned)
        return list(first.values())

    def runs_of(self, cell: int, rows: Rows) -> Iterator[Planned]:
        """The runs of a cell by its place among :attr:`cells`; none of one that the rule refuses.

        It is an octave wider than asked wherever all its runs have ended and the lowest is at an end, as far as the cell reaches.
        """
        one = self.cells[cell]
        if one.plan is None:
            return
        tried = sorted(one.multipliers)
        while True:
            runs = [self._planned(cell, m, seed) for m in tried for seed in one.target.seeds]
            losses = {m: _mean([rows.get(p.run.key) for p in runs if p.multiplier == m]) for m in tried}
            ended = {m: loss for m, loss in losses.items() if loss is not None}
            if len(ended) < len(tried) or min(ended.values()) == float("inf"):
                break
            best = min(tried, key=ended.__getitem__)
            wider = best / 2 if best == tried[0] else best * 2 if best == tried[-1] else None
            if wider is None or not 1 / one.reach <= wider <= one.reach:
                break
            tried = sorted([*tried, wider])
        yield from runs

    def _planned(self, cell: int, multiplier: float, seed: int) -> Planned:
        at = cell, multiplier, seed
        if at not in self._runs:
            one = self.cells[cell]
            self._runs[at] = Planned(one, multiplier, seed, one.run(multiplier, seed, self.spec, self.data))
        return self._runs[at]


def _mean(rows: list[Mapping[str, Any] | None]) -> float | None:
    """Mean loss over seeds, infinite where one diverged; None where one has not ended."""
    total = 0.0
    for row in rows:
        if row is None:
            return None
        total += float("inf") if row["val_loss"] is None else row["val_loss"]
    return total / len(rows)
