"""What a per-role search may turn: one coordinate for each role and number, in quarter-octaves, as a ``[tuned.roles]`` table.

A point is one whole number for each coordinate, 0 for no change: point k multiplies by 2^(k/4). Coordinates follow the
base's own parameters; gains of norms are one, and the depth has two (the outer thirds, against the middle one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from mue.rules.roles import ROLES
from mue.shapes import HParams, Transformer
from mue.shapes.hparams import THIRDS, TIMES, Roles, third_of

Position = tuple[int, ...]
OCTAVE = 4  # steps of a point; whole numbers, so that the same point is the same run, to the last digit
FARTHEST = 4 * OCTAVE  # no multiplier beyond 16 or below 1/16
NUMBERS = ("lr", "init_std", "weight_decay")


@dataclass(frozen=True)
class Coordinate:
    """One multiplier: its name for people, the number it multiplies, and in which tables of ``tuned.roles``."""

    name: str
    number: str
    tables: tuple[str, ...]

    @property
    def label(self) -> str:
        """``"head lr"``."""
        return f"{self.name} {self.number.replace('_', ' ')}"


def coordinates(base: Transformer, numbers: Iterable[str] = NUMBERS, *, thirds: bool = True) -> tuple[Coordinate, ...]:
    """Every multiplier that a search on ``base`` turns, in the order of the forward pass.

    Args:
        numbers: of :data:`NUMBERS`. thirds: also the learning rates of the depth's outer thirds, each as a whole.
    """
    counts = base.counts()
    trained = [role for role in ROLES if counts.get(role) and ROLES[role].trained]
    found = []
    for number in numbers:
        # what starts at 0 by what it is has no std either
        drawn = [r for r in trained if not ROLES[r].vector and not (number == "init_std" and ROLES[r].zero)]
        found += [Coordinate(role, number, (role,)) for role in drawn]
        # Gains have no std and no weight decay to multiply, and one learning rate for all of them.
        gains = tuple(role for role in trained if ROLES[role].vector)
        if number == "lr":
            found.append(Coordinate("norms", number, gains))
    inside = [role for role in trained if ROLES[role].inside]
    if thirds and "lr" in numbers:
        here = {third_of(layer, base.layers) for layer in range(base.layers)}
        outer = [third for third in (THIRDS[0], THIRDS[2]) if third in here and len(here) > 1]
        found += [Coordinate(third, "lr", tuple(f"{third}.{role}" for role in inside)) for third in outer]
    return tuple(found)


def factor(steps: int) -> float:
    """2^(steps/4), to the digits that are printed, so that a table read back is the one that was trained."""
    return float(f"{2 ** (steps / OCTAVE):.4g}")


def roles_of(space: Sequence[Coordinate], point: Position) -> Roles:
    """A point as ``tuned.roles``: only what it changes."""
    found: Roles = {}
    for coordinate, steps in zip(space, point, strict=True):
        for table in coordinate.tables if steps else ():
            found.setdefault(table, {})[coordinate.number + TIMES] = factor(steps)
    return found


def with_multipliers(tuned: HParams, space: Sequence[Coordinate], point: Position) -> HParams:
    """The tuned values with a point's multipliers.

    Args:
        space: the coordinates. point: steps of a quarter-octave, one number for each of them.
    """
    return tuned.replace(roles=roles_of(space, point))


def stepped(point: Position, octaves: Iterable[float]) -> Position:
    """A point a step further, rounded to quarter-octaves and held within :data:`FARTHEST`.

    Args:
        octaves: how far along each coordinate.
    """
    steps = (p + round(OCTAVE * x) for p, x in zip(point, octaves, strict=True))
    return tuple(max(-FARTHEST, min(FARTHEST, s)) for s in steps)


def mirrored_design(factors: int, spare: int = 1) -> npt.NDArray[np.int64]:
    """Signs (pairs, factors) of an orthogonal two-level design, to be run as x and as -x.

    Columns of Sylvester's Hadamard matrix, the constant one left out. Every column is balanced and orthogonal to every
    other, so each run serves every coordinate; run with its mirror image, main effects are clear of curvature and of
    products of two coordinates (Box & Wilson, J. R. Stat. Soc. B 13, 1951).

    Args:
        factors: coordinates. spare: directions left over, at least, by which the noise can be told.
    """
    pairs = 16  # at least: enough rows to tell the noise by
    while pairs < factors + spare:
        pairs *= 2
    kernel = np.array([[1, 1], [1, -1]])
    hadamard = reduce(np.kron, [kernel] * (pairs.bit_length() - 1))
    return np.asarray(hadamard[:, 1 : factors + 1])
