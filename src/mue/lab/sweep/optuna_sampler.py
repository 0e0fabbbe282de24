"""What the samplers that Optuna draws for us have in common: our trials as a study of Optuna's, and its draws as our points."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mue.lab.sweep.sampler import AXES, Sampler
from mue.lab.sweep.trial import OPEN, Point, Trial, name_of
from mue.lab.valley.cell import ADAMW_LR, BETAS, CellValues

if TYPE_CHECKING:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

_TIRED = 20  # draws beyond those wanted: a sampler over a range of one value would go on for ever


class OptunaSampler(Sampler):
    """Points that an Optuna sampler draws from the ranges of the lists, seeds in turn.

    The sampler sees the trials in a study of its own in memory and is seeded with their number: what a random sampler
    proposes next depends on nothing else, so that every worker proposes the same.
    """

    @abstractmethod
    def seeded(self, seed: int) -> Any:
        """Optuna's sampler, with that seed."""

    def propose(self, trials: Sequence[Trial], n: int) -> list[Point]:
        import optuna

        grid = self.grid
        assert grid.trials is not None
        count = min(n, grid.trials - len(trials))
        axes = (*AXES, *((ADAMW_LR,) if grid.adamw_lr else ()))
        ranges: dict[str, Any] = {axis: _range(getattr(grid, axis)) for axis in axes}
        if grid.betas:
            ranges["betas"] = _choice(grid.betas)
        study = _study(trials, ranges)
        known, draws = {name_of(t.point) for t in trials}, 0
        out: list[Point] = []
        while len(out) < count and draws < count + _TIRED:
            number = len(trials) + draws
            # Anew for each draw: what comes out depends on the trials and not on what this worker drew before.
            study.sampler = self.seeded(number)
            drawn: optuna.Trial = study.ask(ranges)
            point = {axis: float(drawn.params[axis]) for axis in axes}
            if grid.betas:
                point |= dict(zip(BETAS, map(float, drawn.params["betas"].split("/")), strict=True))
            point["seed"] = grid.seeds[number % len(grid.seeds)]
            if name_of(point) not in known:
                known.add(name_of(point))
                out.append(point)
            draws += 1
        return out


def _study(trials: Sequence[Trial], ranges: dict[str, Any]) -> Any:
    """The trials as Optuna knows them; of a point outside the ranges, as after these were narrowed, what lies inside."""
    import optuna
    from optuna.trial import TrialState, create_trial

    study = optuna.create_study()  # in memory: ours in the storage would cost a transaction for each question
    for t in trials:
        values = {**t.point, "betas": _text(CellValues.of(t.point).betas)}
        inside = {axis: values[axis] for axis, r in ranges.items() if axis in values and _holds(r, values[axis])}
        state = TrialState.RUNNING if t.state in OPEN else TrialState.COMPLETE
        value = t.loss if state == TrialState.COMPLETE else None
        kinds = {axis: ranges[axis] for axis in inside}
        study.add_trial(create_trial(params=inside, distributions=kinds, value=value, state=state))
    return study


def _text(betas: tuple[float, ...]) -> str:
    """A pair as Optuna, whose choices are plain values, is told of it; ``repr`` loses no bit."""
    return "/".join(repr(float(beta)) for beta in betas)


def _choice(betas: Sequence[tuple[float, float]]) -> CategoricalDistribution:
    from optuna.distributions import CategoricalDistribution

    return CategoricalDistribution([_text(pair) for pair in betas])


def _holds(distribution: Any, value: Any) -> bool:
    if isinstance(value, str):
        return value in distribution.choices
    return bool(distribution.low <= value <= distribution.high)


def _range(points: Sequence[float]) -> FloatDistribution:
    """From the lowest to the highest; by factors, where none is zero."""
    from optuna.distributions import FloatDistribution

    return FloatDistribution(points[0], points[-1], log=points[0] > 0)
