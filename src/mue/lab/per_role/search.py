"""The per-role search: which multipliers lower the loss, by how much, and how sure that is. Pure but for ``train``.

Each round trains a mirrored orthogonal design around the point reached so far (``mue.lab.per_role.space``), takes the
noise out of the slopes, and tries joint steps of three lengths against the point, seed by seed, on seeds of their own. A
step is taken only if its gain's interval, widened for every length, look and round, excludes zero. What each multiplier
bought is then measured on fresh seeds, and on fresher ones the whole set against one global value for everything, its
learning rate retuned as well.

The same losses give the same search, so that a killed one goes on from its finished runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mue.lab.per_role.space import NUMBERS, Coordinate, Position, factor, mirrored_design, stepped, with_multipliers
from mue.lab.per_role.stats import Gain, noise_of, paired, shares, shrunk, slopes
from mue.shapes import HParams
from mue.util.errors import nearest, positive, positive_int, true_or_false

Candidate = tuple[HParams, int]
"""Tuned values and a seed."""
Train = Callable[[str, Sequence[Candidate]], list[float]]
"""Trains a batch of jobs, named for people; the losses in order, inf where a run diverged."""

LENGTHS = (0.5, 1.0, 2.0)  # of a joint step, in steps of its design: slopes say where to go, not how far
# Seeds after which an unsettled step is looked at. Each look is half as many again; every one has its share of the
# error.
LOOKS = (4, 6, 9, 13)
SPARE = 8  # degrees of freedom for the spread of the shares: with fewer Student's t makes every interval wide
# The global learning rates that the result must beat as well: a joint step that does no more than correct the sweep's
# rate is no gain of roles.
RATES = (2**-0.5, 2**0.5)


@dataclass(frozen=True)
class Search:
    """``[roles]`` of a file.

    Attributes:
        numbers: which of lr, init_std and weight_decay get multipliers. thirds: the outer thirds of the depth too.
        step: octaves to each side in the first design. rounds: at most so many.
        seeds: of a design. confirm: fresh seeds of the final comparison. error: chance of a false step, and of an interval.
    """

    numbers: tuple[str, ...] = NUMBERS
    thirds: bool = True
    step: float = 1.0
    rounds: int = 2
    seeds: int = 8
    confirm: int = 8
    error: float = 0.05

    def __post_init__(self) -> None:
        if not isinstance(self.numbers, tuple | list) or not self.numbers:
            raise ValueError(f"[roles] numbers must list some of {', '.join(NUMBERS)}, got {self.numbers!r}")
        for name in self.numbers:
            if name not in NUMBERS:
                raise ValueError(f"[roles] numbers: unknown {name!r}{nearest(name, NUMBERS)}")
        object.__setattr__(self, "numbers", tuple(n for n in NUMBERS if n in self.numbers))
        true_or_false("[roles] thirds", self.thirds)
        positive("[roles] step", self.step, below=4)
        positive("[roles] error", self.error, below=1)
        for name in ("rounds", "seeds", "confirm"):
            object.__setattr__(self, name, positive_int(f"[roles] {name}", getattr(self, name)))
        if self.confirm < 3:
            raise ValueError(
                f"[roles] confirm must be at least 3 seeds, got {self.confirm}: fewer have no interval to speak of"
            )


@dataclass(frozen=True)
class Round:
    """One round: the slopes that were measured, the steps that were tried, and the one that was taken (or None)."""

    step: float
    slopes: tuple[float, ...]
    noise: float
    tried: tuple[tuple[Position, Gain], ...]
    taken: Position | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "slopes": list(self.slopes),
            "noise": self.noise,
            "tried": [{"point": list(p), **g.to_dict()} for p, g in self.tried],
            "taken": None if self.taken is None else list(self.taken),
        }


@dataclass(frozen=True)
class Confirmed:
    """The final comparison. losses: arm → one for each fresh seed; gain: on the base as it was; on_best: on the best of one
    global value with its learning rate retuned (the best by the same runs, which favours it)."""

    losses: dict[str, list[float]]
    best: str
    gain: Gain
    on_best: Gain

    @property
    def holds(self) -> bool:
        """Whether the multipliers beat every global value beyond doubt."""
        return self.on_best.low > 0 and self.gain.low > 0


@dataclass(frozen=True)
class RolesResult:
    """What a search found. ``reached``: the point of the last step taken. ``bought``: each of its multipliers' share.
    ``kept``: the point without those that bought nothing. ``confirmed``: None where no step was taken."""

    space: tuple[Coordinate, ...]
    rounds: tuple[Round, ...]
    reached: Position
    bought: dict[Coordinate, Gain]
    kept: Position
    confirmed: Confirmed | None

    @property
    def result(self) -> Position:
        """The multipliers to use: none unless they were confirmed."""
        return self.kept if self.confirmed is not None and self.confirmed.holds else (0,) * len(self.space)

    @property
    def verdict(self) -> str:
        """The search in a sentence."""
        if self.confirmed is None:
            return "no step was better beyond doubt: one global value for every role stays"
        many = sum(1 for k in self.kept if k)
        what = f"{many} multiplier{'s' if many > 1 else ''}"
        against = f"against {self.confirmed.best}: {self.confirmed.on_best}"
        if not self.confirmed.holds:
            return f"{what} not confirmed on fresh seeds ({against}): one global value for every role stays"
        return f"{what} together confirmed on fresh seeds, against the base as it was: {self.confirmed.gain}; {against}"


def search(tuned: HParams, space: tuple[Coordinate, ...], settings: Search, train: Train) -> RolesResult:
    """Run the whole search.

    Args:
        tuned: the base's values, around which it searches. space: what it may turn. settings: of the file.
        train: trains what it is given and returns validation losses in nats; called a few times, with many jobs each.

    Raises:
        ValueError: the base itself diverges with these tuned values; nothing to turn.
    """
    if not space:
        raise ValueError("[roles] leaves no multiplier to search: give numbers, or thirds = true")
    point: Position = (0,) * len(space)
    step, rounds = settings.step, []
    for number in range(settings.rounds):
        made = _round(number, point, step, tuned, space, settings, train)
        rounds.append(made)
        if not made.tried:
            break
        longest = made.taken is not None and made.taken == made.tried[-1][0]
        point = point if made.taken is None else made.taken
        step = step if longest else step / 2  # the longest was best: the way goes on; else the valley is near
    if not any(point):
        return RolesResult(space, tuple(rounds), point, {}, point, None)
    bought, kept = _attribute(point, tuned, space, settings, train)
    return RolesResult(space, tuple(rounds), point, bought, kept, _confirm(kept, tuned, space, settings, train))


def _seeds(stage: int, count: int) -> list[int]:
    """Seeds that no other stage uses; stages: two for each round, then the shares, then the confirmation.

    A step that was chosen on some seeds looks better there than it is. 10,000 apart, for stages are never that long,
    and far from the small seeds that sweeps use.
    """
    return [10_000 * (stage + 1) + i for i in range(count)]


def _round(
    number: int,
    point: Position,
    step: float,
    tuned: HParams,
    space: Sequence[Coordinate],
    settings: Search,
    train: Train,
) -> Round:
    """Measure every slope at ``point``, then try joint steps down it."""
    name = f"round {number + 1}"
    signs = mirrored_design(len(space))
    seeds = _seeds(2 * number, settings.seeds)
    jobs = [
        (with_multipliers(tuned, space, stepped(point, side * step * row)), seeds[pair % len(seeds)])
        for side in (1, -1)
        for pair, row in enumerate(signs)
    ]
    losses = train(f"{name}: {len(jobs)} probes of {len(space)} multipliers, × {2**step:.3g} and / {2**step:.3g}", jobs)
    effects = slopes(signs, losses[: len(signs)], losses[len(signs) :])
    noise = noise_of(effects, [coordinate.number for coordinate in space])
    tried: tuple[tuple[Position, Gain], ...] = ()
    taken = None
    if (direction := -shrunk(effects, noise)).any():
        direction /= np.abs(direction).max()  # the largest slope goes a whole step, the others in proportion
        steps = dict.fromkeys(stepped(point, length * step * direction) for length in LENGTHS)
        steps.pop(point, None)
        error = settings.error / settings.rounds  # Bonferroni, here over rounds, in _test over lengths and looks
        tried, taken = _test(name, point, list(steps), _seeds(2 * number + 1, LOOKS[-1]), error, tuned, space, train)
    return Round(step, tuple(float(e) for e in effects), noise, tried, taken)


def _test(
    name: str,
    point: Position,
    steps: list[Position],
    seeds: list[int],
    error: float,
    tuned: HParams,
    space: Sequence[Coordinate],
    train: Train,
) -> tuple[tuple[tuple[Position, Gain], ...], Position | None]:
    """Joint steps against the point, seed by seed; after the first look only the best goes on.

    The chance that a step which gains nothing is taken is at most ``error``: each look at each step has its share.
    """
    # Bonferroni over steps and looks; two-sided, of which one side takes a step.
    share = 2 * error / (max(1, len(steps)) * len(LOOKS))
    losses: dict[Position, list[float]] = {p: [] for p in (point, *steps)}
    gains: dict[Position, Gain] = {}
    racing = list(steps)
    for look in LOOKS if steps else ():
        new = seeds[len(losses[point]) : look]
        arms = [point, *racing]
        jobs = [(with_multipliers(tuned, space, arm), seed) for arm in arms for seed in new]
        found = iter(train(f"{name}: {len(racing)} joint steps on {look} seeds", jobs))
        for arm in arms:
            losses[arm] += [next(found) for _ in new]
        if not all(map(math.isfinite, losses[point])):
            raise ValueError("the base itself diverges with these tuned values: lower [tuned] lr")
        gains |= {arm: paired(losses[point], losses[arm], share) for arm in racing}
        racing = [max(racing, key=lambda arm: gains[arm].mean)]
        best = gains[racing[0]]
        if best.low > 0 or best.mean <= 0:  # settled; one that gains nothing in the mean is not worth more seeds
            break
    taken = racing[0] if steps and gains[racing[0]].low > 0 else None
    return tuple((p, gains[p]) for p in steps), taken


def _attribute(
    point: Position, tuned: HParams, space: Sequence[Coordinate], settings: Search, train: Train
) -> tuple[dict[Coordinate, Gain], Position]:
    """Each multiplier's share of the gain, and the point without those that bought nothing."""
    active = [i for i, k in enumerate(point) if k]
    signs = mirrored_design(len(active), SPARE)
    seeds = _seeds(2 * settings.rounds, len(signs))

    def subset(on: npt.NDArray[np.bool_]) -> Position:
        chosen = {i for i, here in zip(active, on, strict=True) if here}
        return tuple(k if i in chosen else 0 for i, k in enumerate(point))

    jobs = [
        (with_multipliers(tuned, space, subset(side * row > 0)), s)
        for side in (1, -1)
        for row, s in zip(signs, seeds, strict=True)
    ]
    losses = train(f"what each of {len(active)} multipliers bought: {len(jobs)} runs with half of them", jobs)
    bought = shares(signs, losses[: len(signs)], losses[len(signs) :], settings.error)
    # Whatever gained in the mean stays: no single share may be beyond doubt (± 0.015 nats each in docs/LOG.md,
    # "Per-role tuning at the base"), and it is the set that is confirmed.
    good = [i for i, g in zip(active, bought, strict=True) if not g.mean <= 0]  # one without a number stays
    kept = tuple(k if i in good else 0 for i, k in enumerate(point))
    return {space[i]: g for i, g in zip(active, bought, strict=True)}, kept


def _confirm(point: Position, tuned: HParams, space: Sequence[Coordinate], settings: Search, train: Train) -> Confirmed:
    """The set against one global value for every role, and against that one with a smaller and a larger learning rate."""
    alone = {"one global value": tuned}
    alone |= {f"one global value, lr × {rate:.3g}": tuned.replace(lr=tuned.lr * rate) for rate in RATES}
    arms = {**alone, "per-role": with_multipliers(tuned, space, point)}
    seeds = _seeds(2 * settings.rounds + 1, settings.confirm)
    found = train(f"confirmation on {len(seeds)} fresh seeds", [(arm, s) for arm in arms.values() for s in seeds])
    losses = {name: found[i * len(seeds) : (i + 1) * len(seeds)] for i, name in enumerate(arms)}
    best = min(alone, key=lambda name: sum(losses[name]))
    gain, on_best = (paired(losses[name], losses["per-role"], settings.error) for name in ("one global value", best))
    return Confirmed(losses, best, gain, on_best)


def multipliers(found: RolesResult) -> list[dict[str, Any]]:
    """Every multiplier of the point reached, with what it bought, for JSON and reports."""
    rows = []
    for coordinate, reached, kept in zip(found.space, found.reached, found.kept, strict=True):
        if reached:
            bought = found.bought[coordinate].to_dict()
            row = {"name": coordinate.label, "times": factor(reached), "kept": kept != 0, **bought}
            rows.append(row)
    return rows
