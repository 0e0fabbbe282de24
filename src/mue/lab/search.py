"""Where to train next so that the valley's minimum is known with the fewest runs, and when it is.

    space = Space(lr=(1e-4, 1e-1), weight_decay=(0.1,), init_std=(0.02,), seeds=(0, 1, 2), precision=0.25, budget=40)
    while points := next_points(space, results, running, count=idle_workers):
        ...                                       # train them; results arrive in any order
    print(verdict(space, results).why)

Both functions are pure: the same results in any order give the same answer, so any number of workers may ask, and a
search that was killed goes on from its results alone. Learning rates lie on a lattice of about an eighth of an octave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mue.lab.valley import Point, Valley, fit_valley

__all__ = ["Asked", "CellFound", "Observation", "Space", "Verdict", "next_points", "verdict"]

_LATTICE = 8  # learning rates per octave
_COARSE = (1 / 2, 1 / 6, 5 / 6, 1 / 3, 2 / 3, 0.0, 1.0)  # shares of the range, in the order they are asked for


@dataclass(frozen=True)
class Space:
    """What a search may ask for, and what it is to reach.

    lr: the ends of the range. weight_decay, init_std: the values to choose among. seeds: of the replicates.
    precision: octaves; the search stops when the 95 % interval of the minimum is no wider than twice this.
    budget: runs in all, diverged and stopped ones included. extend: go beyond an end of the range at which the minimum lies.
    """

    lr: tuple[float, float]
    weight_decay: tuple[float, ...]
    init_std: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    precision: float = 0.25
    budget: int = 40
    extend: bool = False

    def __post_init__(self) -> None:
        low, high = self.lr
        if not (0 < low < high and math.isfinite(high)):
            raise ValueError(f"lr must be the two ends of a range, the lower first, got {low:g} and {high:g}")
        for name in ("weight_decay", "init_std", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must list at least one value and none twice, got {list(getattr(self, name))}")
        if not (math.isfinite(self.precision) and self.precision > 0):
            raise ValueError(f"precision must be a positive number of octaves, got {self.precision}")
        if self.budget < 1:
            raise ValueError(f"the budget must be at least one run, got {self.budget}")

    @property
    def cells(self) -> tuple[tuple[float, float], ...]:
        """Every (weight decay, init std)."""
        return tuple((wd, std) for std in self.init_std for wd in self.weight_decay)

    @property
    def lattice(self) -> tuple[float, ...]:
        """log2 of the learning rates that may be asked for, ascending, both ends of the range among them."""
        low, high = (math.log2(end) for end in self.lr)
        n = max(2, math.ceil((high - low) * _LATTICE))
        return tuple(low + (high - low) * i / n for i in range(n + 1))


@dataclass(frozen=True)
class Asked:
    """One run to make."""

    lr: float
    weight_decay: float
    init_std: float
    seed: int

    @property
    def values(self) -> dict[str, float]:
        """The tuned values, as a sweep names them."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "init_std": self.init_std}


@dataclass(frozen=True)
class Observation:
    """What became of a run. loss: NaN or inf where it has none: it diverged, or was stopped as hopeless."""

    asked: Asked
    loss: float


@dataclass(frozen=True)
class CellFound:
    """The valley of one weight decay and init std; None where no run has a loss yet."""

    weight_decay: float
    init_std: float
    valley: Valley | None
    runs: int


@dataclass(frozen=True)
class Verdict:
    """What is known so far.

    done: nothing more is asked for. why: in a sentence, with what would help. reached: half the width of the interval of
    the minimum in octaves, inf where a side has no bound. interval: of log2 lr, of the best cell.
    """

    done: bool
    why: str
    cells: tuple[CellFound, ...]
    best: CellFound | None
    interval: tuple[float, float]
    reached: float


def next_points(space: Space, results: Sequence[Observation], running: Sequence[Asked], count: int) -> list[Asked]:
    """Up to ``count`` runs to start now; empty when the search is done, or must wait for what is running."""
    if verdict(space, results).done:
        return []
    taken = [r.asked for r in results] + list(running)
    asked: list[Asked] = []
    while len(asked) < count and len(taken) < space.budget:
        point = _next(space, results, taken)
        if point is None:
            break
        asked.append(point)
        taken.append(point)
    return asked


def verdict(space: Space, results: Sequence[Observation]) -> Verdict:
    """What the results say, and whether that is enough."""
    cells = tuple(_found(wd, std, results) for wd, std in space.cells)
    fitted = [cell for cell in cells if cell.valley is not None]
    if not fitted:
        done = len(results) >= space.budget
        why = "every run diverged: search smaller learning rates" if results else "no run yet"
        return Verdict(done, why, cells, None, (-math.inf, math.inf), math.inf)
    best = min(fitted, key=lambda cell: cell.valley.loss_at_minimum if cell.valley else math.inf)
    assert best.valley is not None
    low, high = best.valley.interval
    reached = (high - low) / 2
    if reached <= space.precision and best.valley.determined:
        return Verdict(True, f"precise enough: {best.valley.verdict}", cells, best, (low, high), reached)
    if len(results) >= space.budget:
        return Verdict(True, f"the budget is spent: {best.valley.verdict}", cells, best, (low, high), reached)
    return Verdict(False, best.valley.verdict, cells, best, (low, high), reached)


def _found(wd: float, std: float, results: Iterable[Observation]) -> CellFound:
    own = [r for r in results if (r.asked.weight_decay, r.asked.init_std) == (wd, std)]
    points = [Point(math.log2(r.asked.lr), r.loss, r.asked.seed) for r in own]
    finite = any(math.isfinite(p.loss) for p in points)
    return CellFound(wd, std, fit_valley(points) if finite else None, len(own))


def _next(space: Space, results: Sequence[Observation], taken: Sequence[Asked]) -> Asked | None:
    """The first free coarse point of the cell with the fewest runs, else one near the lowest."""
    lattice = space.lattice
    wd, std = min(space.cells, key=lambda c: sum((t.weight_decay, t.init_std) == c for t in taken))
    valley = _found(wd, std, results).valley
    centre = valley.minimum if valley else lattice[len(lattice) // 2]
    coarse = [lattice[round(share * (len(lattice) - 1))] for share in _COARSE]
    near = sorted(lattice, key=lambda x: (abs(abs(x - centre) - 2.0), x))
    for x in [*coarse, *near]:
        for seed in space.seeds:
            asked = Asked(2.0**x, wd, std, seed)
            if asked not in taken and (x not in coarse or seed == space.seeds[0]):
                return asked
    return None
