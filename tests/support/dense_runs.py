"""Small runs of a dense model, of a kind that can be stacked."""

from __future__ import annotations

from dataclasses import replace

import mue
from mue.lab.data import Corpus
from mue.lab.data.spec import describe_data
from mue.lab.sweep.spec import base_plan
from mue.lab.train.run import Run, Settings

BASE = mue.Dense(32, 32, 1, head_dim=16, sequence=32)
SETTINGS = Settings(eval_every=10, eval_sequences=8, log_every=2)


def dense_run(source: dict[str, object], corpus: Corpus, lr: float = 0.01, seed: int = 0, steps: int = 24) -> Run:
    """A run of the base itself; learning rate, seed and length are what runs of one stack may differ in."""
    tuned = mue.HParams(lr=lr, weight_decay=0.1, init_std=0.1, clip=1.0)
    plan = base_plan(BASE, mue.Training(128, steps), tuned)
    return Run(plan, replace(SETTINGS, seed=seed), describe_data(dict(source), corpus))
