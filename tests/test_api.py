"""What users hold: a plan that refuses attributes it does not have, and a ``transfer`` that is one function everywhere."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

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


def test_what_a_transfer_is_given_is_numbers() -> None:
    """A module, or a dictionary, is refused by name; before, the first attribute that it lacks was reported."""
    shape, tuned, run = mue.Dense(64, 64, 2), mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.1), mue.Training(8, 8)
    module = torch.nn.Linear(3, 3)
    for arguments, words in (
        ((module, shape, tuned), r"base is a Linear: .* give mue\.Dense\(.*mue inspect"),
        ((shape, module, tuned), "target is a Linear"),
        ((shape, make(), tuned), "target is a Plan"),
        ((shape, shape, {"lr": 1e-3}), r"tuned is a dict: give mue\.HParams"),
        ((shape, shape, run), "tuned is a Training"),
    ):
        with pytest.raises(ValueError, match=words):
            mue.transfer(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a run is a tuple: give mue\.Training"):
        mue.transfer(shape, shape, tuned, base_training=run, training=(8, 8))  # type: ignore[arg-type]
    assert mue.transfer(make(), make().target).hash  # the negative control: a plan may be a base


def test_what_there_is_is_listed() -> None:
    """In a fresh process, before anything of it was used; and what is listed is there."""
    code = (
        "import mue; names = dir(mue); print(*names); [getattr(mue, n) for n in names]; print(mue.fold.fold.__name__)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[1] == "fold"
    assert {"Layout", "check", "coordinate_check", "fold", "moe", "layouts", "transfer"} <= set(told[0].split())
    assert not {"Any", "annotations", "import_module", "TYPE_CHECKING"} & set(told[0].split())
