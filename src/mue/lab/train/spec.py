"""The ``[run]`` table of an experiment file, and the plan of the model it trains.

An experiment file is a plan file (``mue.plan.toml``) with the lab's tables beside it: ``[data]`` (``mue.lab.data.spec``), ``[run]`` here, and
for a sweep ``[sweep]`` (``mue.lab.sweep.spec``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mue.lab.train.run import Settings
from mue.lab.train.task import task_of
from mue.plan.plan import PlanData
from mue.plan.toml import PLAN_TABLES, check_keys, plan_inputs, table_of, training_from
from mue.plan.transfer import plan_of
from mue.shapes import HParams

RUN_KEYS = tuple(f.name for f in fields(Settings))
AUTO = "auto"  # of [run] precision: what mue.lab.runners.precision measures and decides before there is a run


def settings_from(data: Mapping[str, Any], auto: str | None = None) -> Settings:
    """``[run]``, with defaults for what it leaves out.

    Args:
        data: the tables of the file. auto: what precision = "auto" stands for, where nothing is trained; None: it has to be settled.

    Raises:
        ValueError: an unknown key or task, or a value out of its range; a precision that nobody has settled.
    """
    table = table_of(data, "run")
    check_keys(table, RUN_KEYS, "[run]")
    if table.get("precision") == AUTO:
        if auto is None:
            raise ValueError(
                '[run] precision = "auto" is settled by mue train, sweep, study and tune-roles for the folder they write to:'
                ' say "fp32" or "bf16" here, or call mue.lab.runners.precision.settle_precision'
            )
        table = {**table, "precision": auto}
    settings = Settings(**table)
    task_of(settings)
    return settings


def train_plan(data: Mapping[str, Any], tuned: HParams | None) -> PlanData:
    """The plan a training file asks for: of its target, or of the base itself where it has no target.

    Args:
        data: the tables of the file. tuned: the base's values from a finished sweep; None: the file's ``[tuned]``.

    Returns:
        The plan; of the base itself every factor is 1.

    Raises:
        ValueError: no ``[base.training]`` where the base is to be trained, or whatever the plan's tables lack.
    """
    tables = {k: v for k, v in data.items() if k in PLAN_TABLES}
    if "target" in data:
        return plan_of(plan_inputs(tables, tuned))
    base = table_of(data, "base")
    training = training_from(base, "base")
    if training is None:
        raise ValueError("training the base needs [base.training] with batch and steps")
    # The base as its own target; its habits say how it was tuned, and a target has none.
    same = {**tables, "target": {k: v for k, v in base.items() if k not in ("convention", "output_multiplier")}}
    return plan_of(plan_inputs(same, tuned))
