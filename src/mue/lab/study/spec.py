"""A study's file: ``[base]`` and ``[tuned]`` as a plan file has them, ``[data]`` and ``[run]`` as a sweep's, and what is compared.

    [study]
    seeds = [0, 1]
    multipliers = [0.5, 1, 2]          # of the transferred learning rate
    reach = 8                          # where the lowest lies at an end, go on by octaves up to so many times (1: stay)

    [approaches.complete-mue]          # the rule of that name, with its defaults
    [approaches."betas carried"]
    rule = "complete-mue"
    options = { betas = "linear" }
    [approaches.step-law]              # standard parametrization, its rate by a fitted law
    rule = "standard"
    law = "step-law"
    multipliers = [1]

    [axes.width]                       # each target is the base, changed in these keys
    targets = [{ width = 64, ffn = 64 }, { width = 128, ffn = 128 }]
    [axes.duration]
    targets = [{ steps = 160 }, { steps = 2560 }]

The base itself is a target of every axis: what its own valley says of the tuned rate is part of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mue.lab.data.spec import data_source
from mue.lab.train.run import Run, Settings
from mue.lab.train.spec import settings_from
from mue.lab.train.task import task_of
from mue.plan.plan import PlanData
from mue.plan.replan import scaled
from mue.plan.toml import MOE_KEYS, check_keys, lr_grid, shape_from, table_of, training_from, tuned_from
from mue.plan.transfer import transfer
from mue.rules.laws.law import lr_law
from mue.rules.options import OPTIONS
from mue.shapes import HParams, Training, Transformer
from mue.util.errors import nearest, positive

BASE = "base"  # the name of the base among an axis' targets
TOP = ("data", "run", "base", "tuned", "study", "approaches", "axes")
APPROACH_KEYS = ("rule", "options", "tuned", "law", "multipliers")
TARGET_KEYS = (
    "name",
    "batch",
    "steps",
    "approaches",
    "seeds",
    "multipliers",
    "reach",
)  # a target's keys beside its shape's
STUDY_KEYS = ("seeds", "multipliers", "reach")
AXIS_KEYS = ("targets", "approaches", *STUDY_KEYS)


@dataclass(frozen=True)
class Approach:
    """One way to the target's values.

    Attributes:
        rule, options: as :func:`mue.plan.transfer.transfer` takes them. tuned: the base's values, as this approach has them.
        law: a learning-rate law by name, whose ratio of target to base multiplies the rate; "" for none.
        multipliers: of the rate, instead of the study's; () for the study's.
    """

    name: str
    rule: str
    options: Mapping[str, Any]
    tuned: HParams
    law: str = ""
    multipliers: tuple[float, ...] = ()


@dataclass(frozen=True)
class Target:
    """One model trained one way on one axis.

    Attributes:
        axis, name: by which it is found.
        approaches: names of those that are tried on it. seeds, multipliers, reach: as the study has them, or its own.
    """

    axis: str
    name: str
    shape: Transformer
    training: Training
    approaches: tuple[str, ...]
    seeds: tuple[int, ...]
    multipliers: tuple[float, ...]
    reach: float


@dataclass(frozen=True)
class StudyCell:
    """One target by one approach: what a valley is fitted to.

    Attributes:
        plan: at multiplier 1; None where the rule refuses the change. refused: its reason then.
    """

    target: Target
    approach: Approach
    plan: PlanData | None
    refused: str = ""

    @property
    def multipliers(self) -> tuple[float, ...]:
        """What is tried first."""
        return self.approach.multipliers or self.target.multipliers

    @property
    def reach(self) -> float:
        """How far the multipliers may be widened; an approach with multipliers of its own stays at those."""
        return 1.0 if self.approach.multipliers else self.target.reach

    def run(self, multiplier: float, seed: int, spec: StudySpec, data: dict[str, Any]) -> Run:
        """The run at a multiple of the transferred rate.

        Args:
            data: as a run keeps it (:func:`mue.lab.data.spec.describe_data`).
        """
        assert self.plan is not None
        return Run(scaled(self.plan, multiplier), replace(spec.settings, seed=seed), data)


@dataclass(frozen=True)
class StudySpec:
    """A study as its file says it.

    Attributes:
        base, training, tuned: what was tuned, how long it was trained, and the values found.
        approaches: by name, in the file's order. targets: of all axes, in the file's order. settings: of every run.
        source: where the data is (:func:`mue.lab.data.spec.open_data`). tables: the file's own, to be stored.
    """

    base: Transformer
    training: Training
    tuned: HParams
    approaches: Mapping[str, Approach]
    targets: tuple[Target, ...]
    settings: Settings
    source: dict[str, Any]
    tables: Mapping[str, Any]

    @property
    def axes(self) -> tuple[str, ...]:
        """Their names, in the file's order."""
        return tuple(dict.fromkeys(target.axis for target in self.targets))

    def on(self, axes: tuple[str, ...]) -> StudySpec:
        """The study of some axes only.

        Args:
            axes: names; none for all.

        Raises:
            ValueError: an axis that the study does not have.
        """
        for axis in axes:
            if axis not in self.axes:
                raise ValueError(f"the study has no axis {axis!r}{nearest(axis, self.axes)}")
        return replace(self, targets=tuple(t for t in self.targets if not axes or t.axis in axes))

    def cells(self) -> Iterator[StudyCell]:
        """Every target by every approach that is tried on it."""
        for target in self.targets:
            for name in target.approaches:
                yield self._cell(target, self.approaches[name])

    def _cell(self, target: Target, approach: Approach) -> StudyCell:
        # A base has no forward multiplier as a target: what it is trained with is A = A*/ρ_e with ρ_e = 1.
        shape = replace(target.shape, output_multiplier=1.0)
        try:
            plan = transfer(
                self.base,
                shape,
                approach.tuned,
                base_training=self.training,
                training=target.training,
                rule=approach.rule,
                **approach.options,
            )
        except ValueError as error:
            return StudyCell(target, approach, None, str(error))
        if approach.law:
            # a ratio: constants belong to other models, tokenizers and schedules, and only the exponents are left
            law = lr_law(approach.law)
            plan = scaled(plan, law.ratio((self.base, self.training), (target.shape, target.training)))
        return StudyCell(target, approach, plan)


def study_from(data: Mapping[str, Any], folder: Path) -> StudySpec:
    """Read a study's file.

    Args:
        data: its tables. folder: the file's, to which its relative paths are relative.

    Raises:
        ValueError: a table or key is missing, unknown or out of its range; the text names it and the fix.
    """
    check_keys(data, TOP, "the study file's top level")
    for name in ("base", "tuned", "approaches", "axes"):
        if not table_of(data, name):
            raise ValueError(f"a study file needs a [{name}] table; mue study --help has an example")
    base = table_of(data, "base")
    training = training_from(base, "base")
    if training is None:
        raise ValueError("a study needs [base.training] with batch (tokens per step) and steps")
    tuned = table_of(data, "tuned")
    approaches = {name: _approach(name, table, tuned) for name, table in table_of(data, "approaches").items()}
    shape = shape_from(base, "base", ("training", "output_multiplier"))
    for approach in approaches.values():
        _check_values(approach, shape, training)
    study = table_of(data, "study")
    check_keys(study, STUDY_KEYS, "[study]")
    usual = {"seeds": [0, 1], "multipliers": [0.5, 1, 2], "reach": 8, "approaches": list(approaches)} | study
    targets = tuple(
        target
        for axis, table in table_of(data, "axes").items()
        for target in _targets(axis, table, base, training, usual, approaches)
    )
    settings = settings_from(data)
    return StudySpec(
        base=shape,
        training=training,
        tuned=tuned_from(tuned),
        approaches=approaches,
        targets=targets,
        settings=settings,
        source=data_source(data, folder, task_of(settings).reads),
        tables={k: v for k, v in data.items() if k != "data"},
    )


def _said(key: str, value: Any) -> str:
    """A changed key of a target in words: ``"width 64"``, of a table ``"router expert-choice, within sequence"``."""
    if not isinstance(value, Mapping):
        return f"{key} {value}"
    named = [f"{key} {value['name']}"] if "name" in value else [key]
    return ", ".join([*named, *(f"{k} {v}" for k, v in value.items() if k != "name")])


def _approach(name: str, table: Mapping[str, Any], tuned: Mapping[str, Any]) -> Approach:
    where = f"[approaches.{name}]"
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} must be a table, got {table!r}")
    check_keys(table, APPROACH_KEYS, where)
    law = table.get("law", "")
    if law:
        lr_law(law)
    check_keys(options := table_of(table, "options", f"approaches.{name}."), OPTIONS, f"[approaches.{name}.options]")
    return Approach(
        name=name,
        rule=table.get("rule", name),
        options=options,
        tuned=tuned_from({**tuned, **table_of(table, "tuned", f"approaches.{name}.")}),
        law=law,
        multipliers=_multipliers(table["multipliers"], where) if "multipliers" in table else (),
    )


def _check_values(approach: Approach, base: Transformer, training: Training) -> None:
    """Plan the base as its own target, which every rule can: what is wrong then is the file's, and no answer of the rule.

    Raises:
        ValueError: a rule, an option, a role or a value that does not exist, with the approach that has it.
    """
    try:
        transfer(
            base,
            replace(base, output_multiplier=1.0),
            approach.tuned,
            base_training=training,
            training=training,
            rule=approach.rule,
            **approach.options,
        )
    except ValueError as error:
        raise ValueError(f"[approaches.{approach.name}]: {error}") from None


def _targets(
    axis: str,
    table: Mapping[str, Any],
    base: Mapping[str, Any],
    training: Training,
    usual: Mapping[str, Any],
    approaches: Mapping[str, Approach],
) -> Iterator[Target]:
    """The base and the targets of one axis.

    Args:
        usual: seeds, multipliers, reach and approaches where the axis and the target say nothing of them.
    """
    where = f"[axes.{axis}]"
    if not isinstance(table, Mapping) or not isinstance(table.get("targets"), list) or not table["targets"]:
        raise ValueError(f"{where} needs targets: a list of tables, e.g. targets = [{{ width = 64, ffn = 64 }}]")
    check_keys(table, AXIS_KEYS, where)
    usual = {**usual, **{k: v for k, v in table.items() if k != "targets"}}
    for number, changes in enumerate([{"name": BASE}, *table["targets"]]):
        here = f"{where} target {number}"
        if not isinstance(changes, Mapping):
            raise ValueError(f"{here} must be a table of what it changes of the base, got {changes!r}")
        own = {k: v for k, v in changes.items() if k in TARGET_KEYS}
        keys = {k: v for k, v in changes.items() if k not in TARGET_KEYS}
        # dense and with experts exclude each other: a target that says one drops what the base has of the other
        drop = ("training", "output_multiplier", *(("ffn",) if "moe" in keys else MOE_KEYS if "ffn" in keys else ()))
        shape = shape_from({**{k: v for k, v in base.items() if k not in drop}, **keys}, here)
        for name in (chosen := own.get("approaches", usual["approaches"])):
            if name not in approaches:
                raise ValueError(f"{here}: unknown approach {name!r}{nearest(name, approaches)}")
        seeds = own.get("seeds", usual["seeds"])
        if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
            raise ValueError(f"{here}: seeds must be a list of whole numbers, got {seeds!r}")
        yield Target(
            axis=axis,
            name=own.get("name") or ", ".join(_said(k, v) for k, v in changes.items() if k not in TARGET_KEYS[3:]),
            shape=shape,
            training=Training(own.get("batch", training.batch), own.get("steps", training.steps)),
            approaches=tuple(chosen),
            seeds=tuple(dict.fromkeys(seeds)),
            multipliers=_multipliers(own.get("multipliers", usual["multipliers"]), here),
            reach=max(1.0, positive(f"{here}: reach", own.get("reach", usual["reach"]))),
        )


def _multipliers(value: Any, where: str) -> tuple[float, ...]:
    """A list of multipliers with 1 among them: what is transferred is always measured."""
    found = tuple(lr_grid(value, f"{where} multipliers"))
    if 1.0 not in found:
        raise ValueError(f"{where} multipliers must have 1 among them, the transferred value itself, got {value!r}")
    return found


def octave(multiplier: float) -> float:
    """log2 of a multiplier."""
    return math.log2(multiplier)
