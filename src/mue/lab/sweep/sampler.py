"""What a sweep visits, and the samplers, which say where in it to train next: each is a file in ``samplers``, or yours.

@SAMPLERS.register("mine")            # sampler = "mine" in [sweep]; see mue.util.registry for where yours lies
class Mine(Sampler):
    keys = ("skip",)                  # of [sweep], found in self.grid.options

    def propose(self, trials, n): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from mue.lab.sweep.trial import Point, Trial
from mue.lab.valley.search import Space
from mue.util.registry import Registry

AXES = ("lr", "weight_decay", "init_std")
"""The tuned values that every sweep looks for. Betas are one more where a grid has them; all others are given."""
LATER = ("betas", "adamw_lr")
"""Axes that a sweep has where its table names them."""
_STORED = {
    "precision": Space.precision,
    "extend": Space.extend,
}  # of the valley search: files have them whatever the sampler is


@dataclass(frozen=True)
class Grid:
    """What a sweep visits, and how it is run.

    Attributes:
        lr, weight_decay, init_std: ascending values: all of them are visited, or they span the ranges that are sampled.
        betas, adamw_lr: pairs and rates to choose among; none: they are as ``[tuned]`` has them.
        seeds: of the runs at one place. sampler: a name in :data:`SAMPLERS`. trials: at most so many (None: every place).
        options: the sampler's own keys. stop_early: give up runs that can no longer move the minimum.
        runner: how runs are trained (``mue.lab.runners.runner``).
    """

    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    init_std: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    sampler: str = "grid"
    trials: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    stop_early: bool = False
    runner: str = "auto"
    betas: tuple[tuple[float, float], ...] = ()
    adamw_lr: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON, options among the rest; :meth:`from_dict` reads it back. What no grid had before is there where it is used."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in LATER or getattr(self, f.name)}
        options, *last = (own.pop(name) for name in ("options", "stop_early", "runner"))
        return own | _STORED | dict(options) | dict(zip(("stop_early", "runner"), last, strict=True))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Grid:
        """The grid that :meth:`to_dict` wrote. ``ValueError``, ``KeyError`` or ``TypeError`` for anything else."""
        stored: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        options = {key: stored.pop(key) for key in SAMPLERS.lookup(data["sampler"]).keys if key in stored}
        stored |= {"betas": tuple(map(tuple, stored["betas"]))} if "betas" in stored else {}
        fields_of_grid = {key: value for key, value in stored.items() if key not in _STORED}
        return cls(**fields_of_grid, options=options)


class Sampler(ABC):
    """Says which points of a grid to train, given what has come of others. Pure: the same trials, the same answer, so that any
    number of workers may ask, and a sweep that was killed goes on from its storage alone.

    Attributes:
        keys: of the ``[sweep]`` table, beside those that every sweep has.
        seeds, trials: what the table means where it is silent; trials None: the table must say it.
        exhaustive: every point is known from the start (:meth:`points`), and the table has no ``trials``.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    seeds: ClassVar[tuple[int, ...]] = (0,)
    trials: ClassVar[int | None] = None
    exhaustive: ClassVar[bool] = False

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The sampler's own keys of a ``[sweep]`` table, as :attr:`Grid.options` keeps them. ``ValueError`` for a bad value."""
        return {key: table[key] for key in cls.keys if key in table}

    def points(self) -> list[Point]:
        """Every point in the order they are started, where they are known before the first run; else []."""
        return []

    @abstractmethod
    def propose(self, trials: Sequence[Trial], n: int) -> list[Point]:
        """What to train next.

        Args:
            trials: every one so far, open ones included, by number. n: how many can be trained at once.

        Returns:
            Up to ``n`` new points, each with a value for every axis and a seed; [] when the sampler is done or must
            wait for what is running.
        """

    def why_done(self, trials: Sequence[Trial]) -> str | None:
        """What the sampler says of itself at its end, in a sentence; None where it has nothing to say."""
        return None


SAMPLERS: Registry[type[Sampler]] = Registry("sampler", home="mue.lab.sweep.samplers")


def sampler_of(grid: Grid) -> Sampler:
    """The sampler that a grid names. ``ValueError`` for an unknown name, or a grid that it cannot sample."""
    return SAMPLERS.lookup(grid.sampler)(grid)
