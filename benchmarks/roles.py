"""Per-role tuning on a small dense base, and whether what it gains carries over to a MoE of twice the width.

    python benchmarks/roles.py --out runs/roles --json docs/results/roles.json

The base, its run and the MoE are the demo's, and so are the tuned values, as it found them when this was begun (today's fit
of the same sweep says lr 9.97e-3). Every run is kept in ``--out``, so that the command can be started again. The MoE's seeds
are its own; the plans differ in [tuned.roles] only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mue
from mue.api import Plan
from mue.lab.data.spec import STDLIB, describe_data, open_corpus
from mue.lab.per_role.report import roles_report
from mue.lab.per_role.search import Search
from mue.lab.per_role.space import with_multipliers
from mue.lab.per_role.stats import paired
from mue.lab.per_role.tune import RolesSpec, tune_roles
from mue.lab.runners.listener import RunListener
from mue.lab.runners.run_all import run_all
from mue.lab.sweep.spec import base_plan
from mue.lab.train.provenance import provenance
from mue.lab.train.run import Run, Settings, Store
from mue.util.files import write_json

BASE = mue.Dense(width=64, ffn=64, layers=3, head_dim=32, sequence=128)
MOE = mue.MoE.parse("16e4a1s", width=128, expert=64, layers=4, head_dim=32, sequence=128)
DENSE = mue.Dense(width=128, ffn=320, layers=4, head_dim=32, sequence=128)  # of the MoE's active width
BASE_RUN, RUN = mue.Training(512, 240), mue.Training(512, 320)
TUNED = mue.HParams(lr=8.919e-3, weight_decay=0.1, init_std=0.15, warmup=0.1, bias_speed=0.01)
SETTINGS = Settings(eval_sequences=192)
LONGER = (1.25, 1.5, 2.0)  # of the base's steps, to say how much faster


class Quiet(RunListener):
    """Counts the runs of a batch."""

    def __init__(self, title: str, runs: Sequence[Run]) -> None:
        self.title, self.total, self.done = title, len(runs), 0

    def ended(self, run: Run, result: dict[str, Any], *, fresh: bool) -> None:
        self.done += 1
        print(f"\r{self.title}: {self.done} of {self.total}", end="", flush=True)

    def __exit__(self, *_: object) -> None:
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/roles"))
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=4, help="of the MoE and of the longer runs")
    parser.add_argument("--rounds", type=int, default=Search.rounds, help="of the search")
    args = parser.parse_args()
    source = {"source": STDLIB, "cache": str(args.out / "data")}
    corpus = open_corpus(source)
    data = describe_data(source, corpus)
    spec = RolesSpec(BASE, BASE_RUN, TUNED, Search(rounds=args.rounds), SETTINGS, source)
    found = tune_roles(spec, args.out, corpus, Quiet, workers=args.workers)
    roles_report(args.out)
    print(found.verdict)
    # Carried over even where it was not confirmed, for a negative result is one too.
    tuned = with_multipliers(TUNED, found.space, found.kept)
    # Beyond every stage of the search, whose seeds begin 10,000 apart (mue.lab.per_role.search).
    seeds = range(90_000, 90_000 + args.seeds)

    def losses(name: str, plan: Plan) -> list[float]:
        runs = [Run(plan, replace(SETTINGS, seed=seed), data) for seed in seeds]
        with Quiet(name, runs) as listener:
            results = run_all(runs, Store(args.out), workers=args.workers, listener=listener)
        return [math.inf if (y := results[run.key]["val_loss"]) is None else y for run in runs]

    arms: dict[str, list[float]] = {}
    for target in (MOE, DENSE):
        for name, values in (("one global value", TUNED), ("per-role", tuned)):
            plan = mue.transfer(BASE, target, values, base_training=BASE_RUN, training=RUN)
            arms[f"{target.name}, {name}"] = losses(f"{target.name}, {name}", plan)
    for name, values, times in (("per-role", tuned, 1.0), *(("one global value", TUNED, x) for x in (1.0, *LONGER))):
        run = mue.Training(BASE_RUN.batch, round(BASE_RUN.steps * times))
        label = f"base, {name}, {run.steps} steps"
        arms[label] = losses(label, base_plan(BASE, run, values))
    gains = {
        target.name: paired(*(arms[f"{target.name}, {name}"] for name in ("one global value", "per-role")), 0.05)
        for target in (MOE, DENSE)
    }
    for name, gain in gains.items():
        print(f"{name}: {gain}")
    if args.json:
        search = json.loads((args.out / "result.json").read_text())
        carried = {"losses": arms, "gains": {k: g.to_dict() for k, g in gains.items()}, "seeds": list(seeds)}
        write_json(
            args.json,
            {"command": " ".join(["python", *sys.argv]), **provenance(), "carried": carried, "search": search},
        )


if __name__ == "__main__":
    main()
