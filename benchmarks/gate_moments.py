"""Every router at init and over its first steps: ``python benchmarks/gate_moments.py > docs/results/gate_moments.json``.

For each router: E[Σw] and E[Σw²] by its own formula, where it has one, against those measured on text (Python's own library) over 8
inits, with 95 % intervals, in the first and the last layer; and the coordinate check over the width (32, 64, 128; two seeds): the
largest distance of a slope from what the rule predicts. Control: the same under the standard parametrization.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import mue
from mue.lab.data import Batches, Corpus
from mue.lab.data.corpus import stdlib_corpus
from mue.lab.models.language import LanguageModel
from mue.lab.train.gate_moments import measure_gates
from mue.lab.train.provenance import provenance
from mue.lab.train.run import Settings
from mue.shapes import ROUTERS, Transformer

BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
TUNED = mue.HParams(lr=0.008, weight_decay=0.1, init_std=0.1)


def shape(router: str, notation: str, width: int, **more: Any) -> mue.MoE:
    numbers = {"width": width, "expert": width, "layers": 2, "head_dim": 16, "sequence": 32, **more}
    return mue.MoE.parse(notation, router=router, **numbers)


def moments(router: str, notation: str, corpus: Corpus) -> dict[str, Any]:
    plan = mue.transfer(BASE, shape(router, notation, 64, layers=4), TUNED)
    found = measure_gates(plan.inputs, Settings(), corpus)
    by_formula = plan.target.blocks[0].moments
    layers = [
        {
            "layer": one.layer,
            "m1": one.m1,
            "m1_error": one.error1,
            "m2": one.m2,
            "m2_error": one.error2,
            "active": one.active,
        }
        for one in (found[0], found[-1])
    ]
    return {"shape": plan.target.name, "plan": plan.hash, "formula": by_formula, "measured": layers}


def coordinates(router: str, notation: str, corpus: Corpus, rule: str = "complete-mue") -> dict[str, Any]:
    batches = Batches(corpus, "train", 32, 16, 0)
    plans = {w: mue.transfer(BASE, shape(router, notation, w), TUNED, rule=rule) for w in (32, 64, 128)}

    def build(target: Transformer) -> LanguageModel:
        return LanguageModel(target, plans[target.width].multipliers)

    found = mue.coordinate_check(
        build, lambda target: plans[target.width], {"width": [plan.target for plan in plans.values()]},
        lambda step: batches.at(step + 1), seeds=(0, 1), raises=False,
    )  # fmt: skip
    off = {
        f"{s.module}, {s.quantity}": max(s.expected[0] - s.slope, s.slope - s.expected[1], 0.0) for s in found.slopes
    }
    worst = max(off, key=lambda name: off[name])
    verdicts = [s.verdict for s in found.slopes]
    return {"slopes": len(off), "failed": verdicts.count("fail"), "largest_distance": off[worst], "of": worst}


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as cache:
        corpus = stdlib_corpus(Path(cache))
        rows = []
        for name, kind in ROUTERS.items():
            notation = "16e2a" if kind.active is None else f"16e{kind.active}a"
            row = moments(name, notation, corpus) | {"coordinates": coordinates(name, notation, corpus)}
            rows.append({"router": name, **row})
        control = coordinates("sigmoid", "16e2a", corpus, rule="standard")
        told = {
            "command": "python benchmarks/gate_moments.py",
            **provenance(),
            "seeds": [0, 1],
            "data": corpus.describe(),
        }
        print(json.dumps({**told, "routers": rows, "standard_rule": control}, indent=1))


if __name__ == "__main__":
    main()
