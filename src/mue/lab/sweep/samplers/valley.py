"""``sampler = "valley"``: what the valley search (``mue.lab.valley.search``) asks for between the lowest and the highest lr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mue.lab.sweep.sampler import SAMPLERS, Grid, Sampler
from mue.lab.sweep.trial import OPEN, Point, Trial
from mue.lab.valley.cell import CellValues
from mue.lab.valley.search import Observation, Proposal, Space, next_points, verdict
from mue.util.errors import positive, true_or_false


@SAMPLERS.register("valley", place=1)
class ValleySampler(Sampler):
    """Narrows the place of the minimum until it is known to ``precision`` octaves, beyond the range's ends with ``extend``."""

    keys = ("precision", "extend")
    seeds = Space.seeds  # three, since runs of one seed err together: half of the noise is the seeds' (docs/LOG.md)
    trials = Space.budget

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        if len(grid.lr) < 2:
            raise ValueError("[sweep] lr needs the two ends of the range that the valley search looks in")
        self.space = Space(
            lr=(grid.lr[0], grid.lr[-1]),
            weight_decay=grid.weight_decay,
            init_std=grid.init_std,
            betas=grid.betas,
            adamw_lr=grid.adamw_lr,
            seeds=grid.seeds,
            budget=grid.trials or Space.budget,
            **grid.options,
        )

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "precision": positive("[sweep] precision", table.get("precision", Space.precision)),
            "extend": true_or_false("[sweep] extend", table.get("extend", Space.extend)),
        }

    def propose(self, trials: Sequence[Trial], n: int) -> list[Point]:
        running = [_asked(t.point) for t in trials if t.state in OPEN]
        return [a.point for a in next_points(self.space, _observed(trials), running, n)]

    def why_done(self, trials: Sequence[Trial]) -> str | None:
        return verdict(self.space, _observed(trials)).why


def _observed(trials: Sequence[Trial]) -> list[Observation]:
    """The ended trials as the search sees them; a diverged or stopped one has no loss."""
    return [Observation(_asked(t.point), t.loss) for t in trials if t.state not in OPEN]


def _asked(point: Point) -> Proposal:
    return Proposal.at(point["lr"], CellValues.of(point), int(point["seed"]))
