"""``sampler = "random"``: points drawn from the ranges of the lists, without looking at any loss."""

from __future__ import annotations

from typing import Any

from mue.lab.sweep.optuna_sampler import OptunaSampler
from mue.lab.sweep.sampler import SAMPLERS


@SAMPLERS.register("random", place=2)
class RandomSampler(OptunaSampler):
    """Uniform draws, of the logarithm where no value is zero."""

    def seeded(self, seed: int) -> Any:
        import optuna

        return optuna.samplers.RandomSampler(seed=seed)
