"""A small MoE run that trains in a second or two, and how to break it off."""

from __future__ import annotations

import mue
from mue.lab.data import Corpus
from mue.lab.data.spec import describe_data
from mue.lab.train.run import Run, Settings

BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
TARGET = mue.MoE.parse("8e2a1s", width=64, expert=32, layers=2, head_dim=16, sequence=32)
TUNED = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1, clip=1.0, z=1e-3)
SETTINGS = Settings(eval_every=10, eval_sequences=8, log_every=2)
STEPS = 24


def moe_run(corpus: Corpus, settings: Settings = SETTINGS, steps: int = STEPS, tuned: mue.HParams = TUNED) -> Run:
    """A run with everything that a checkpoint must hold: balance biases, z loss, clipping."""
    training = mue.Training(128, steps)
    tuned = tuned.replace(balance=0.01 if settings.balance == "loss" else 0.0)
    plan = mue.transfer(BASE, TARGET, tuned, base_training=training, training=training)
    return Run(plan, settings, describe_data({"source": []}, corpus))


class Stop(Exception):  # noqa: N818
    """A run is broken off as by a crash."""


def stop_at(step: int):
    """A ``progress`` for ``train`` that breaks the run off at a step."""

    def progress(at: int, loss: float) -> None:
        if at >= step:
            raise Stop

    return progress
