"""``sampler = "tpe"``: Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011)."""

from __future__ import annotations

from typing import Any

from mue.lab.sweep.optuna_sampler import OptunaSampler
from mue.lab.sweep.sampler import SAMPLERS


@SAMPLERS.register("tpe", place=3)
class TpeSampler(OptunaSampler):
    """Draws where low losses are more frequent than high ones."""

    def seeded(self, seed: int) -> Any:
        import optuna

        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # so that workers do not all ask for one point
