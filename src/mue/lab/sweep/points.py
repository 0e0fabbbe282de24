"""Which points a sweep still has to try: a grid's all at once, a search's as results come in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mue.lab.sweep.spec import Grid
from mue.lab.sweep.trials import OPEN, Point, Trial, name_of
from mue.lab.valley.search import Asked, Observation, Space, next_points, verdict

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution

AXES = ("lr", "weight_decay", "init_std")
_TIRED = 20  # proposals in a row that are all known: a sampler over few values has nothing more to say


def grid_points(grid: Grid) -> list[Point]:
    """Every combination, in the order they are started; empty where a search proposes instead.

    Learning rates from the middle outwards: the ends come when it shows whether they matter (``mue.lab.valley.pruning``).
    """
    if grid.sampler != "grid":
        return []
    middle = (len(grid.lr) - 1) / 2
    outwards = sorted(grid.lr, key=lambda lr: abs(grid.lr.index(lr) - middle))
    points = itertools.product(grid.init_std, grid.weight_decay, outwards, grid.seeds)
    return [{"lr": lr, "weight_decay": wd, "init_std": std, "seed": seed} for std, wd, lr, seed in points]


def proposed(grid: Grid, trials: Sequence[Trial], count: int) -> list[Point]:
    """Up to ``count`` new points that the search asks for, given every trial so far; [] when it is done or must wait."""
    if grid.sampler == "grid" or count < 1:
        return []
    if grid.sampler == "valley":
        running = [_asked(t.point) for t in trials if t.state in OPEN]
        return [{**a.values, "seed": a.seed} for a in next_points(space_of(grid), observed(trials), running, count)]
    assert grid.trials is not None
    return _sampled(grid, trials, min(count, grid.trials - len(trials)))


def space_of(grid: Grid) -> Space:
    """What a valley search may ask for: the range of the listed learning rates, the other lists as they are."""
    return Space(
        lr=(grid.lr[0], grid.lr[-1]),
        weight_decay=grid.weight_decay,
        init_std=grid.init_std,
        seeds=grid.seeds,
        precision=grid.precision,
        budget=grid.trials or Space.budget,
        extend=grid.extend,
    )


def observed(trials: Sequence[Trial]) -> list[Observation]:
    """The ended trials as the search sees them; a diverged or stopped one has no loss."""
    return [Observation(_asked(t.point), t.loss) for t in trials if t.state not in OPEN]


def why_done(grid: Grid, trials: Sequence[Trial]) -> str | None:
    """What a valley search says of itself at its end."""
    return verdict(space_of(grid), observed(trials)).why if grid.sampler == "valley" else None


def _asked(point: Point) -> Asked:
    return Asked(point["lr"], point["weight_decay"], point["init_std"], int(point["seed"]))


def _sampled(grid: Grid, trials: Sequence[Trial], count: int) -> list[Point]:
    """Points that an Optuna sampler draws from the ranges of the lists, seeds in turn.

    The sampler sees the trials in a study of its own in memory and is seeded with their number: what a random sampler
    proposes next depends on nothing else, so that every worker proposes the same.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    samplers: dict[str, Any] = {
        "random": optuna.samplers.RandomSampler,
        "tpe": partial(optuna.samplers.TPESampler, constant_liar=True),  # so that workers do not all ask for one point
    }
    ranges = {axis: _range(getattr(grid, axis)) for axis in AXES}
    study = optuna.create_study()
    for t in trials:
        inside = {axis: t.point[axis] for axis, r in ranges.items() if r.low <= t.point[axis] <= r.high}
        state = TrialState.RUNNING if t.state in OPEN else TrialState.COMPLETE
        value = t.loss if state == TrialState.COMPLETE else None
        kinds = {axis: ranges[axis] for axis in inside}
        study.add_trial(create_trial(params=inside, distributions=kinds, value=value, state=state))  # type: ignore[arg-type]
    known, draws = {name_of(t.point) for t in trials}, 0
    out: list[Point] = []
    while len(out) < count and draws < count + _TIRED:
        number = len(trials) + draws
        study.sampler = samplers[grid.sampler](seed=number)
        drawn = study.ask(ranges)  # type: ignore[arg-type]
        point = {**{axis: float(drawn.params[axis]) for axis in AXES}, "seed": grid.seeds[number % len(grid.seeds)]}
        if name_of(point) not in known:
            known.add(name_of(point))
            out.append(point)
        draws += 1
    return out


def _range(points: Sequence[float]) -> FloatDistribution:
    """From the lowest to the highest; by factors, where none is zero."""
    from optuna.distributions import FloatDistribution

    return FloatDistribution(points[0], points[-1], log=points[0] > 0)
