"""What may never change unnoticed: plan hashes and run keys taken before the house was rebuilt, from inputs with every option written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mue.fold import fold
from mue.lab.data import load_corpus
from mue.lab.train.run import Run, Settings
from mue.plan.plan import PlanData
from mue.plan.replan import inputs_from_dict, retuned
from mue.plan.transfer import plan_of
from support.paths import GOLDEN

PINS = json.loads((GOLDEN / "pins.json").read_text(encoding="utf-8"))


def planned(pin: dict[str, Any]) -> PlanData:
    plan = plan_of(inputs_from_dict(pin["inputs"]))
    return fold(plan, pin["folded"]) if pin["folded"] else plan


def test_there_are_as_many_pins_as_promised() -> None:
    assert len(PINS["plans"]) >= 30 and len({p["hash"] for p in PINS["plans"]}) == len(PINS["plans"])
    assert len(PINS["runs"]) >= 10 and len({r["key"] for r in PINS["runs"]}) == len(PINS["runs"])


@pytest.mark.parametrize("index", range(len(PINS["plans"])))
def test_a_plan_keeps_its_hash(index: int) -> None:
    pin = PINS["plans"][index]
    plan = planned(pin)
    assert plan.hash == pin["hash"], pin["name"]
    assert retuned(plan, lr=plan.tuned.lr * 1.01).hash != pin["hash"]  # the hash can tell plans apart


def test_runs_keep_their_keys(tmp_path: Path) -> None:
    corpus = load_corpus(GOLDEN / "pins_corpus.txt", cache=tmp_path)
    assert corpus.hash == PINS["corpus"]["hash"]
    data = {**corpus.describe(), "source": {"source": "pins"}}
    keys = [Run(plan_of(inputs_from_dict(r["plan"])), Settings(**r["settings"]), data).key for r in PINS["runs"]]
    assert keys == [r["key"] for r in PINS["runs"]]
    first = PINS["runs"][0]
    other = Settings(**{**first["settings"], "seed": first["settings"]["seed"] + 1})
    assert Run(plan_of(inputs_from_dict(first["plan"])), other, data).key not in keys
