"""Where to train next so that the valley's minimum is known with the fewest runs, and when it is.

    space = Space(lr=(1e-4, 1e-1), weight_decay=(0.1,), init_std=(0.02,), seeds=(0, 1, 2), precision=0.25, budget=40)
    while points := next_points(space, results, running, count=idle_workers):
        ...                                       # train them; results arrive in any order
    print(verdict(space, results).why)

A search starts with three learning rates far apart and halves the bracket around the lowest; from then on each run goes
where it narrows the place of the minimum most (``mue.lab.valley.placement``). A cell is one weight decay and init std (and one
pair of betas, where they are looked for): those that may still be the best share the runs. Both functions are pure: the same results in any order give the same answer,
so any number of workers may ask, and a search that was killed goes on from its results alone. Learning rates lie on a
lattice of about an eighth of an octave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mue.lab.valley.cell import CellValues, each
from mue.lab.valley.fit import Valley
from mue.lab.valley.search_cell import Lattice, SearchCell
from mue.lab.valley.window import LossPoint

_LATTICE = 8  # learning rates per octave: finer than any interval of a proxy, and runs at one place are replicates
# Shares of the range that are always tried: a second valley must not be missed unseen. It costs about one run; without
# it 43 % of 30 searches with two valleys were confidently wrong, with it 10 % (docs/LOG.md, "Fewer runs") ...
_SURVEY = (1 / 2, 1 / 6, 5 / 6)
# ... and those that are where they lie next to the lowest, in the order they are asked for.
_COARSE = (1 / 3, 2 / 3, 0.0, 1.0)
_NEAR = (0.0, -1.5, 1.5, -3.0, 3.0)  # octaves from another cell's minimum, where one is known
_EXTENSION, _EXTENSIONS = 2.0, 3  # octaves at a time beyond an end of the range, and how often
# Chance of a minimum beyond an end: to look there if one may, and to call it an edge. To look costs a run, to call it
# ends the search.
_MAYBE, _SURE = 0.2, 0.9
_DOUBT = 2.0  # standard deviations that a cell's depth may be off


@dataclass(frozen=True)
class Space:
    """What a search may ask for, and what it is to reach.

    Attributes:
        lr: the ends of the range. weight_decay, init_std, betas, adamw_lr: the values to choose among; of the last two empty: not
            looked for.
        seeds: of the replicates; the more, the better, since runs of one seed err together.
        precision: octaves; the search stops when the 95 % interval of the minimum is no wider than twice this.
        budget: runs in all, diverged and stopped ones included. Intervals of small, noisy proxies are an octave or two
            wide whatever places the runs (docs/sweeps.md), so that it often ends the search.
        extend: go beyond an end of the range at which the minimum lies, at most six octaves.
    """

    lr: tuple[float, float]
    weight_decay: tuple[float, ...]
    init_std: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    precision: float = 0.25
    budget: int = 40
    extend: bool = False
    betas: tuple[tuple[float, ...], ...] = ()
    adamw_lr: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        low, high = self.lr
        if not (0 < low < high and math.isfinite(high)):
            raise ValueError(f"lr must be the two ends of a range, the lower first, got {low:g} and {high:g}")
        for name in ("weight_decay", "init_std", "seeds", "betas", "adamw_lr"):
            values = getattr(self, name)
            if not (values or name in ("betas", "adamw_lr")) or len(set(values)) < len(values):
                raise ValueError(f"{name} must list at least one value and none twice, got {list(values)}")
        if not (math.isfinite(self.precision) and self.precision > 0):
            raise ValueError(f"precision must be a positive number of octaves, got {self.precision}")
        if self.budget < 1:
            raise ValueError(f"the budget must be at least one run, got {self.budget}")

    @property
    def cells(self) -> tuple[CellValues, ...]:
        """Every combination of weight decay, init std and, where they are looked for, betas and AdamW's lr."""
        return tuple(
            CellValues(wd, std, betas, rate)
            for rate in each(self.adamw_lr)
            for betas in self.betas or ((),)
            for std in self.init_std
            for wd in self.weight_decay
        )


@dataclass(frozen=True)
class Proposal:
    """One run to make."""

    lr: float
    weight_decay: float
    init_std: float
    seed: int
    betas: tuple[float, ...] = ()
    adamw_lr: tuple[float, ...] = ()

    @classmethod
    def at(cls, lr: float, cell: CellValues, seed: int) -> Proposal:
        """In a cell."""
        return cls(lr, cell.weight_decay, cell.init_std, seed, cell.betas, cell.adamw_lr)

    @property
    def cell(self) -> CellValues:
        """In which cell it is."""
        return CellValues(self.weight_decay, self.init_std, self.betas, self.adamw_lr)

    @property
    def point(self) -> dict[str, float]:
        """The values and the seed, as a sweep names them."""
        return {"lr": self.lr, **self.cell.point, "seed": self.seed}


@dataclass(frozen=True)
class Observation:
    """What became of a run. loss: NaN or inf where it has none: it diverged, or was stopped as hopeless."""

    proposal: Proposal
    loss: float


@dataclass(frozen=True)
class CellResult:
    """The valley of one cell; None where no run has a loss yet."""

    values: CellValues
    valley: Valley | None
    runs: int


@dataclass(frozen=True)
class Verdict:
    """What is known so far.

    Attributes:
        done: nothing more is asked for. why: in a sentence, with what would help.
        interval: of the best cell's minimum, in log2 lr. reached: half its width in octaves, inf where a side has no bound.
    """

    done: bool
    why: str
    cells: tuple[CellResult, ...]
    best: CellResult | None
    interval: tuple[float, float]
    reached: float


def next_points(
    space: Space, results: Sequence[Observation], running: Sequence[Proposal], count: int
) -> list[Proposal]:
    """What to train next.

    Args:
        results: of every run that ended, in any order. running: those under way.
        count: how many more can be trained at once.

    Returns:
        Up to ``count`` runs; none when the search is done, or must wait for what is running.
    """
    proposals: list[Proposal] = []
    if verdict(space, results).done:
        return proposals
    while len(proposals) < min(count, space.budget - len(results) - len(running)):
        more = _Search(space, tuple(results), (*running, *proposals)).ask()
        if more is None:
            break
        proposals.append(more)
    return proposals


def verdict(space: Space, results: Sequence[Observation]) -> Verdict:
    """What the results say, and whether that is enough.

    Args:
        results: of every run that ended, in any order; those under way make no difference.
    """
    return _Search(space, tuple(results), ()).verdict()


@dataclass(frozen=True)
class _Search:
    """A search at one moment: all that it knows is its arguments, so that every worker works out the same."""

    space: Space
    results: tuple[Observation, ...]
    running: tuple[Proposal, ...]

    @cached_property
    def cells(self) -> tuple[SearchCell, ...]:
        def cell(values: CellValues) -> SearchCell:
            ended = (r for r in self.results if r.proposal.cell == values)
            points = [LossPoint(math.log2(r.proposal.lr), r.loss, r.proposal.seed) for r in ended]
            under_way = [(math.log2(a.lr), a.seed) for a in self.running if a.cell == values]
            return SearchCell(
                values, tuple(sorted(points, key=lambda p: (p.log2_lr, p.seed))), tuple(sorted(under_way))
            )

        return tuple(cell(values) for values in self.space.cells)

    @cached_property
    def best(self) -> SearchCell | None:
        """The deepest cell; while none has a curve, the one with the lowest loss."""
        some = [(c, c.valley) for c in self.cells if c.valley]
        return min(some, key=lambda pair: (pair[0].depth[0], pair[1].loss_at_minimum))[0] if some else None

    @cached_property
    def asked_for(self) -> Lattice:
        low, high = (math.log2(end) for end in self.space.lr)
        count = max(2, math.ceil((high - low) * _LATTICE))
        return Lattice(low, (high - low) / count, count)

    @cached_property
    def lattice(self) -> Lattice:
        """The range, extended where that is allowed and the minimum lies beyond it."""
        lattice = self.asked_for
        for _ in range(_EXTENSIONS if self.space.extend and self.best else 0):
            assert self.best is not None
            end = self.best.beyond(lattice.low, lattice.high, _MAYBE)
            lattice = lattice.extended(_EXTENSION, end) if end else lattice
        return lattice

    def ask(self) -> Proposal | None:
        """The next run; None when nothing is left to ask for before more results are in."""
        for cell in self.cells:
            place = self._coarse(cell)
            if place:
                return self._asked(cell, place)
        # First the cell that may be deepest, not the one that is: what is least known gets its chance.
        for cell in sorted(self._contenders, key=lambda c: c.depth[0] - _DOUBT * c.depth[1]):
            place = cell.doubtful(self.lattice, self.space.seeds) or cell.most_informative(
                self.lattice, self.space.seeds
            )
            if place:
                return self._asked(cell, place)
        return None

    def _asked(self, cell: SearchCell, place: tuple[float, int]) -> Proposal:
        return Proposal.at(2.0 ** place[0], cell.values, place[1])

    def _coarse(self, cell: SearchCell) -> tuple[float, int] | None:
        """The next learning rate to begin with: over the range, or near the minimum of another cell; the ends last."""
        # Where another cell's minimum is known, this one is looked at around it, and its range is not surveyed again.
        known = [c.valley.minimum for c in self.cells if c is not cell and c.posterior and c.valley]
        low, high = self.asked_for.low, self.asked_for.high
        ends = self.lattice.low, self.lattice.high
        if known:
            return cell.coarse((), [*(known[0] + d for d in _NEAR), *ends], self.lattice, self.space.seeds[0])
        survey, near = ([low + share * (high - low) for share in shares] for shares in (_SURVEY, _COARSE))
        return cell.coarse(survey, [*near, *ends], self.lattice, self.space.seeds[0])

    @cached_property
    def _contenders(self) -> list[SearchCell]:
        """The best cell, and those that may still be deeper by more than the noise of a run."""
        if self.best is None or self.best.posterior is None:
            return []
        bar = self.best.depth[0] - self.best.posterior.noise
        return [c for c in self.cells if c.posterior and (c is self.best or c.depth[0] - _DOUBT * c.depth[1] < bar)]

    def verdict(self) -> Verdict:
        """What is known, and whether to go on: precise enough, at an edge, spent, or none of these."""
        cells = tuple(CellResult(c.values, c.valley, len(c.points)) for c in self.cells)
        spent = len(self.results) >= self.space.budget
        if self.best is None or self.best.valley is None:
            why = "every run diverged: search smaller learning rates" if self.results else "no run has ended yet"
            return Verdict(spent or self._exhausted, why, cells, None, (-math.inf, math.inf), math.inf)
        valley, best = self.best.valley, cells[self.cells.index(self.best)]
        low, high = valley.interval
        reached = (high - low) / 2
        surveyed = all(self._coarse(c) is None for c in self.cells)
        settled = surveyed and len(self._contenders) == 1 and not self._doubtful
        said = "; ".join(filter(None, (valley.verdict, valley.warning)))
        if settled and valley.determined and reached <= self.space.precision:
            return Verdict(True, f"precise enough: {said}", cells, best, valley.interval, reached)
        if settled and self.best.beyond(self.lattice.low, self.lattice.high, _SURE):
            return Verdict(True, f"at the edge: {said}", cells, best, valley.interval, reached)
        if spent or self._exhausted:
            what = "the budget is spent" if spent else "every learning rate and seed has run"
            return Verdict(True, f"{what}: {said}", cells, best, valley.interval, reached)
        return Verdict(False, said, cells, best, valley.interval, reached)

    @property
    def _doubtful(self) -> bool:
        return any(c.doubtful(self.lattice, self.space.seeds) for c in self._contenders)

    @property
    def _exhausted(self) -> bool:
        """Nothing is left to ask for, with everything ended."""
        return bool(self.results) and self.ask() is None
