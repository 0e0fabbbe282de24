"""What users hold: a plan that refuses attributes it does not have, and a ``transfer`` that is one function everywhere."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

import mue
from support.plans import make


def test_a_plan_is_frozen_and_stays_a_plan_however_it_is_copied() -> None:
    plan = make()
    for name in ("notes", "route_scael"):  # a field, and a name with a typo
        with pytest.raises(FrozenInstanceError):
            setattr(plan, name, 1)
    for other in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), replace(plan, notes=())):
        assert type(other) is mue.Plan and other == plan and hash(other) == hash(plan)
    assert plan != plan.scaled(2.0) and type(plan.scaled(2.0)) is mue.Plan


def test_transfer_can_be_sent_to_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pickle.loads(pickle.dumps(mue.transfer)) is mue.transfer
    monkeypatch.setattr(mue.transfer, "__module__", "mue.plan.transfer")  # where the function is that it wraps
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(mue.transfer)


def test_transfer_says_that_it_returns_a_plan() -> None:
    signature = inspect.signature(mue.transfer)
    assert signature.return_annotation == "Plan" and list(signature.parameters)[:3] == ["base", "target", "tuned"]
    assert type(make()) is mue.Plan


def test_the_plan_that_a_plan_starts_from_is_one_too(tmp_path: Path) -> None:
    base = mue.transfer(mue.Dense(64, 64, 2), mue.Dense(128, 128, 2), mue.HParams(1e-3, 0.1, 0.02))
    chain = mue.transfer(base, mue.Dense(256, 256, 2))
    chain.save(tmp_path / "plan.json")
    for plan in (chain, mue.Plan.load(tmp_path / "plan.json"), chain.retuned(lr=2e-3)):
        assert isinstance(plan.inputs.base, mue.Plan) and str(plan.inputs.base).startswith("rule")
