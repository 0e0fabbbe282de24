"""What the samplers that Optuna draws for us have in common: our trials as a study of Optuna's, and its draws as our points."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mue.lab.sweep.sampler import AXES, Sampler
from mue.lab.sweep.trial import OPEN, Point, Trial, name_of

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution

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
        ranges = {axis: _range(getattr(grid, axis)) for axis in AXES}
        study = _study(trials, ranges)
        known, draws = {name_of(t.point) for t in trials}, 0
        out: list[Point] = []
        while len(out) < count and draws < count + _TIRED:
            number = len(trials) + draws
            # Anew for each draw: what comes out depends on the trials and not on what this worker drew before.
            study.sampler = self.seeded(number)
            drawn: optuna.Trial = study.ask(ranges)
            point = {**{axis: float(drawn.params[axis]) for axis in AXES}, "seed": grid.seeds[number % len(grid.seeds)]}
            if name_of(point) not in known:
                known.add(name_of(point))
                out.append(point)
            draws += 1
        return out


def _study(trials: Sequence[Trial], ranges: dict[str, FloatDistribution]) -> Any:
    """The trials as Optuna knows them; of a point outside the ranges, as after these were narrowed, what lies inside."""
    import optuna
    from optuna.trial import TrialState, create_trial

    study = optuna.create_study()  # in memory: ours in the storage would cost a transaction for each question
    for t in trials:
        inside = {axis: t.point[axis] for axis, r in ranges.items() if r.low <= t.point[axis] <= r.high}
        state = TrialState.RUNNING if t.state in OPEN else TrialState.COMPLETE
        value = t.loss if state == TrialState.COMPLETE else None
        kinds = {axis: ranges[axis] for axis in inside}
        study.add_trial(create_trial(params=inside, distributions=kinds, value=value, state=state))  # type: ignore[arg-type]
    return study


def _range(points: Sequence[float]) -> FloatDistribution:
    """From the lowest to the highest; by factors, where none is zero."""
    from optuna.distributions import FloatDistribution

    return FloatDistribution(points[0], points[-1], log=points[0] > 0)
