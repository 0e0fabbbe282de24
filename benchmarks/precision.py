"""Do runs in bf16 end where those in fp32 end? The demo's base and its MoE, paired by seed, with their time.

    python benchmarks/precision.py [--seeds 3] [--out FOLDER] [--json docs/results/precision.json]

One process of one thread at a time. Finished runs in FOLDER are not trained again. A pair has the same init and batches, so what is left
is rounding, and what rounding does to a training; beside it stands how far two seeds of fp32 lie apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mue.lab.data.spec import describe_data, open_data
from mue.lab.demo.demo import experiment
from mue.lab.report.progress import RunProgress
from mue.lab.runners.run_all import run_all
from mue.lab.sweep.spec import base_plan
from mue.lab.train.provenance import provenance
from mue.lab.train.run import PRECISIONS, Run, Store
from mue.plan.transfer import transfer
from mue.shapes import HParams
from mue.util.files import write_json

ROOT = Path(__file__).parents[1]


Cell = tuple[str, str, int]
"""Model, precision, seed."""


def planned(out: Path, seeds: int) -> dict[Cell, Run]:
    """The demo's base and MoE with the values that docs/results/demo.json was tuned to, in each precision and with each seed."""
    ours = experiment(out)
    data = describe_data(ours.spec.source, open_data(ours.spec.source))
    measured = json.loads((ROOT / "docs" / "results" / "demo.json").read_text(encoding="utf-8"))
    tuned = HParams.from_dict(measured["sweep"]["tuned"])
    base, training = ours.spec.base, ours.spec.training
    plans = {
        "base": base_plan(base, training, tuned),
        "MoE": transfer(base, ours.target, tuned, base_training=training, training=ours.training),
    }
    return {
        (name, precision, seed): Run(plan, replace(ours.spec.settings, precision=precision, seed=seed), data)
        for name, plan in plans.items()
        for seed in range(seeds)
        for precision in PRECISIONS
    }


def rows(results: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each model: losses by precision, the paired difference of bf16 with its standard error, the spread of fp32's seeds, the time."""
    found = []
    for name in dict.fromkeys(cell[0] for cell in results):
        seeds = sorted({cell[2] for cell in results if cell[0] == name})
        losses = {p: [results[name, p, seed]["val_loss"] for seed in seeds] for p in PRECISIONS}
        differences = [b - a for a, b in zip(losses["fp32"], losses["bf16"], strict=True)]
        took = [results[name, "bf16", s]["seconds"] / results[name, "fp32", s]["seconds"] for s in seeds]
        found.append(
            {
                "model": name,
                "losses": {p: [round(loss, 4) for loss in of] for p, of in losses.items()},
                "bf16 - fp32": round(statistics.mean(differences), 4),
                "standard error": round(statistics.stdev(differences) / len(differences) ** 0.5, 4),
                "spread of fp32 seeds": round(statistics.stdev(losses["fp32"]), 4),
                "time bf16 / fp32": round(statistics.median(took), 3),
            }
        )
    return found


def main() -> None:
    """Train what is missing and print a row for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/precision"), help="folder of the runs; finished ones are kept"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine here")
    options = parser.parse_args()
    runs = planned(options.out, options.seeds)
    name = {run.key: " ".join(map(str, cell)) for cell, run in runs.items()}
    with RunProgress(Console(), "precision", list(runs.values()), lambda run: name[run.key]) as progress:
        results = run_all(list(runs.values()), Store(options.out), workers=1, listener=progress)
    table = rows({cell: results[run.key] for cell, run in runs.items()})
    for row in table:
        print(json.dumps(row))
    if options.json:
        write_json(options.json, {"command": "python benchmarks/precision.py", **provenance(), "rows": table})


if __name__ == "__main__":
    main()
