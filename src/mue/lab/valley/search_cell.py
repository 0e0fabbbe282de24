"""One cell of a valley search (a weight decay, an init std, perhaps betas): what its runs say, and what it would ask for next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from mue.lab.valley.cell import CellValues
from mue.lab.valley.fit import Valley, fit_with_posterior
from mue.lab.valley.placement import most_informative
from mue.lab.valley.posterior import Posterior
from mue.lab.valley.window import LossPoint, SecondValley

Place = tuple[float, int]
"""log2 of a learning rate, and a seed."""

_TWICE = 2  # runs at a second low place, and at the rise before it, before they are believed: one may have gone wrong


@dataclass(frozen=True)
class Lattice:
    """log2 of the learning rates that may be asked for: ``low + i · step`` for i from 0 to count.

    A lattice, so that workers which compute a place to its last bits differently still ask for the same one.
    """

    low: float
    step: float
    count: int

    @property
    def high(self) -> float:
        return self.low + self.count * self.step

    @property
    def places(self) -> tuple[float, ...]:
        return tuple(self.low + i * self.step for i in range(self.count + 1))

    def index(self, x: float) -> int:
        """Of the nearest place, in the lattice or on its continuation."""
        return round((x - self.low) / self.step)

    def nearest(self, x: float) -> float:
        return self.low + min(max(self.index(x), 0), self.count) * self.step

    def extended(self, octaves: float, end: str) -> Lattice:
        """The lattice that goes on beyond its low or high end."""
        more = round(octaves / self.step)
        return Lattice(self.low - more * self.step * (end == "low"), self.step, self.count + more)


@dataclass(frozen=True)
class SearchCell:
    """The runs of one cell: those that ended, and where those under way are."""

    values: CellValues
    points: tuple[LossPoint, ...]
    under_way: tuple[Place, ...]

    @property
    def valley(self) -> Valley | None:
        """None where no run has a loss yet."""
        return self._studied[0]

    @property
    def posterior(self) -> Posterior | None:
        """None where there is no curve yet."""
        return self._studied[1]

    @cached_property
    def _studied(self) -> tuple[Valley | None, Posterior | None, SecondValley | None]:
        return _study(self.points) if any(math.isfinite(p.loss) for p in self.points) else (None, None, None)

    @cached_property
    def taken(self) -> tuple[Place, ...]:
        """Of every run, ended or not."""
        return tuple((p.log2_lr, p.seed) for p in self.points) + self.under_way

    @cached_property
    def depth(self) -> tuple[float, float]:
        """The loss at the minimum and its standard deviation; inf where there is no curve yet."""
        if self.posterior is None:
            return math.inf, math.inf
        lowest = self.posterior.curves.min(axis=1)
        ended = len(self.points) / len(self.taken)  # what is under way will lower the doubt, too
        return float(lowest.mean()), float(lowest.std()) * math.sqrt(ended)

    @property
    def bracket(self) -> tuple[float, float]:
        """The learning rates next to the lowest, or everything below those that diverged."""
        tried = {p.log2_lr for p in self.points}
        finite = [p for p in self.points if math.isfinite(p.loss)]
        if not finite:
            return -math.inf, min(tried, default=math.inf)
        best = min(finite, key=lambda p: (p.loss, p.log2_lr, p.seed)).log2_lr
        lower, higher = [x for x in tried if x < best], [x for x in tried if x > best]
        return max(lower, default=-math.inf), min(higher, default=math.inf)

    def beyond(self, low: float, high: float, chance: float) -> str | None:
        """The end of the range, "low" or "high", at or beyond which the minimum lies; None where it is at neither.

        Args:
            low, high: the range, in log2(lr). chance: at least this one.
        """
        if self.posterior is None:
            return None
        if float((self.posterior.minima <= low).mean()) >= chance:
            return "low"
        return "high" if float((self.posterior.minima >= high).mean()) >= chance else None

    @property
    def wall(self) -> float:
        """The lowest learning rate from which on every run diverged."""
        finite = max((p.log2_lr for p in self.points if math.isfinite(p.loss)), default=-math.inf)
        return min((p.log2_lr for p in self.points if p.log2_lr > finite), default=math.inf)

    def coarse(self, survey: Iterable[float], wanted: Iterable[float], lattice: Lattice, seed: int) -> Place | None:
        """The first new learning rate of the survey that may train, or of the wanted ones inside the bracket.

        Where all are there and too few have a loss: a new half of the bracket.

        Args:
            survey, wanted: log2(lr), in the order they are asked for. seed: of such runs, the same for all: its share
                of the noise moves the bracket's runs together.
        """
        left, right = self.bracket
        tried = {lattice.index(x) for x, _ in self.taken}
        for x in survey:
            if lattice.index(x) not in tried and x < self.wall:
                return lattice.nearest(x), seed
        inside = [x for x in lattice.places if left < x < right and lattice.index(x) not in tried]
        for x in wanted:
            if lattice.nearest(x) in inside:
                return lattice.nearest(x), seed
        if self.posterior is None and not self.under_way and inside:  # too few with a loss to go on otherwise
            return inside[len(inside) // 2], seed
        return None

    def doubtful(self, lattice: Lattice, seeds: Sequence[int]) -> Place | None:
        """A second low place or the rise before it, with another seed, while it rests on one run."""
        second = self._studied[2]
        for x in (second.at, second.rise) if second else ():
            had = [seed for at, seed in self.taken if lattice.index(at) == lattice.index(x)]
            fresh = [seed for seed in seeds if seed not in had]
            if len(had) < _TWICE and fresh and lattice.low <= x <= lattice.high:
                return x, fresh[0]
        return None

    def most_informative(self, lattice: Lattice, seeds: Sequence[int]) -> Place | None:
        """Where a run narrows the minimum most, with a seed of the cell's or one new to it."""
        if self.posterior is None:
            return None
        had = {(lattice.index(x), seed) for x, seed in self.taken}
        used = [seed for seed in seeds if any(seed == other for _, other in had)]
        fresh = [seed for seed in seeds if seed not in used][:1]  # one is as good as another, having no run yet
        low, high = self._of_use
        places = [x for x in lattice.places if low <= x <= high]
        candidates = [(x, s) for s in used + fresh for x in places if (lattice.index(x), s) not in had]
        if not candidates:
            return None
        known = [(p.log2_lr, p.seed) for p in self.valley.used] if self.valley else []
        x_N, seed_N = np.array(sorted([*known, *self.under_way])).T
        x_C, seed_C = np.array(candidates).T
        return candidates[most_informative(self.posterior, x_N, seed_N, x_C, seed_C)]

    @property
    def _of_use(self) -> tuple[float, float]:
        """Where a run will be part of the fit: half-way at most to a wall, which is no part of it."""
        assert self.posterior is not None and self.valley is not None
        limits, used = self.posterior.limits, self.valley.used
        return (
            limits.low if limits.low_open else (limits.low + used[0].log2_lr) / 2,
            limits.high if limits.high_open else (limits.high + used[-1].log2_lr) / 2,
        )


@lru_cache(maxsize=256)  # a search asks again and again about cells in which nothing happened
def _study(points: tuple[LossPoint, ...]) -> tuple[Valley, Posterior | None, SecondValley | None]:
    return fit_with_posterior(points)
