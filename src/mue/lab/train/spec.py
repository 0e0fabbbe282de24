"""The ``[run]`` table of an experiment file, and the plan of the model it trains.

An experiment file is a plan file (``mue.plan.toml``) with the lab's tables beside it: ``[data]`` (``mue.lab.data.spec``), ``[run]`` here, and
for a sweep ``[sweep]`` (``mue.lab.sweep.spec``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mue.lab.data import Batches, Corpus
from mue.lab.train.run import Run, Settings
from mue.plan.plan import PlanData
from mue.plan.toml import check_keys, plan_inputs, table_of, training_from
from mue.plan.transfer import plan_of
from mue.shapes import HParams

_SETTINGS = tuple(f.name for f in fields(Settings))
PLAN_TABLES = ("rule", "base", "tuned", "target", "options")


def batches_of(run: Run, corpus: Corpus) -> tuple[Batches, Batches]:
    """(training, validation) batches of a run; ``ValueError`` where the text does not suit it. Nothing is written."""
    shape, settings = run.plan.target, run.settings
    assert run.plan.training is not None
    if corpus.vocab > shape.vocab:
        raise ValueError(f"the data has {corpus.vocab} tokens, the model a vocabulary of {shape.vocab}: raise vocab")
    sequences = run.plan.training.batch // shape.sequence
    train = Batches(corpus, "train", shape.sequence, sequences, settings.seed)
    return train, Batches(corpus, "validation", shape.sequence, min(sequences, settings.eval_sequences), 0)


def settings_from(data: Mapping[str, Any]) -> Settings:
    """``[run]``, with defaults for what it leaves out."""
    table = table_of(data, "run")
    check_keys(table, _SETTINGS, "[run]")
    return Settings(**table)


def train_plan(data: Mapping[str, Any], tuned: HParams | None) -> PlanData:
    """The plan a training file asks for: of its target, or of the base itself where it has no target."""
    tables = {k: v for k, v in data.items() if k in PLAN_TABLES}
    if "target" in data:
        return plan_of(plan_inputs(tables, tuned))
    base = table_of(data, "base")
    training = training_from(base, "base")
    if training is None:
        raise ValueError("training the base needs [base.training] with batch and steps")
    same = {**tables, "target": {k: v for k, v in base.items() if k not in ("convention", "output_multiplier")}}
    return plan_of(plan_inputs(same, tuned))
