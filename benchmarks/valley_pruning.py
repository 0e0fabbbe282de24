"""What does early stopping save, and does it leave the fitted minimum where it was?

    python benchmarks/valley_pruning.py [--quick] [--out docs/results/valley_pruning.json]

Recorded sweeps (``valley_record``), their runs made again in many orders: a run that ``mue.lab.valley.pruning`` stops is not fitted
and costs the share of its training that it had. Its constants were chosen on the first fifteen sweeps over six octaves and
the first four over twelve. A minute of one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mue.lab.train.provenance import provenance
from mue.lab.valley import LossPoint, fit_valley
from mue.lab.valley.pruning import PartialRun
from mue.util.files import write_json
from valley_population import Recorded, load
from valley_search import CHOSEN, CHOSEN_WIDE, ROOT, share, trained

_ORDERS = 12  # of each sweep: with eight held out of each kind 192 in all, whose share is known to 2 % where none fails


def pruned(sweep: Recorded, order: Sequence[tuple[int, int]]) -> tuple[list[LossPoint], float]:
    """The runs of a recorded sweep, made in this order with early stopping, and what share of the training it took."""
    ended, cost = list[PartialRun](), 0.0
    for row, place in order:
        whole = PartialRun(float(sweep.x[place]), row, sweep.curves[row, place], float(sweep.loss[row, place]))
        ended.append(trained(whole, ended, sweep.steps))
        cost += ended[-1].curve[-1][0] / sweep.steps if ended[-1].loss is None else 1
    points = [LossPoint(s.log2_lr, math.inf if s.loss is None else s.loss, s.seed) for s in ended]
    return points, cost / len(order)


def pruning(sweeps: Sequence[Recorded], orders: int) -> dict[str, Any]:
    """Recorded sweeps of three seeds in random orders, the first in a grid's own: how far the fitted minimum moves."""
    moved, bounded, costs = [], [], []
    for number, sweep in enumerate(sweeps):
        rows = np.flatnonzero(np.isfinite(sweep.loss).all(axis=1))[:3]
        outwards = sorted(range(len(sweep.x)), key=lambda place: abs(place - (len(sweep.x) - 1) / 2))
        runs = [(int(row), place) for place in outwards for row in rows]
        whole = fit_valley([LossPoint(float(sweep.x[j]), float(sweep.loss[i, j]), i) for i, j in runs])
        for k in range(orders):
            order = np.random.default_rng([15, number, k]).permutation(len(runs)) if k else np.arange(len(runs))
            points, cost = pruned(sweep, [runs[i] for i in order])
            moved.append(abs(fit_valley(points).minimum - whole.minimum))
            bounded.append(whole.determined)
            costs.append(cost)
    within = [m < 0.05 for m in moved]
    return {
        "moves_less_than_0.05": share(within),
        "of_sweeps_that_bound_their_minimum": share([w for w, b in zip(within, bounded, strict=True) if b]),
        "largest_move": round(max(moved), 3),
        "cost": round(float(np.mean(costs)), 4),
        "cost_in_a_grid's_order": round(float(np.mean(costs[::orders])), 4),
    }


def oracle(sweeps: Sequence[Recorded]) -> dict[str, Any]:
    """What a rule that knows how each run will end could give up: all that end so much above the lowest.

    A bound on every rule that judges by a run's loss alone: where it moves minima too far, none can do better.
    """
    out = {}
    for above in (0.2, 0.3, 0.4, 0.5):
        moved, dropped, total = [], 0, 0
        for sweep in sweeps:
            points, whole = sweep.points, fit_valley(sweep.points)
            kept = [p if p.loss < whole.loss_at_minimum + above else replace(p, loss=math.inf) for p in points]
            moved.append(abs(fit_valley(kept).minimum - whole.minimum))
            dropped, total = dropped + sum(math.isinf(p.loss) for p in kept), total + len(points)
        out[f"{above} nats above"] = {
            "given_up": round(dropped / total, 3),
            "moves_less_than_0.05": share([m < 0.05 for m in moved]),
            "largest_move": round(max(moved), 3),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, default=ROOT / "benchmarks/recorded")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="two orders of each sweep")
    given = parser.parse_args()
    orders = 2 if given.quick else _ORDERS
    narrow, wide = load(given.recorded / "sweeps.json"), load(given.recorded / "wide.json")
    result: dict[str, Any] = {
        "command": "python benchmarks/valley_pruning.py" + " --quick" * given.quick,
        **provenance(),
        "six octaves, held out": pruning(narrow[CHOSEN:], orders),
        "six octaves, chosen on": pruning(narrow[:CHOSEN], orders),
        "six octaves, by an oracle": oracle(narrow[:CHOSEN]),
        "twelve octaves, held out": pruning(wide[CHOSEN_WIDE:], orders),
        "twelve octaves, chosen on": pruning(wide[:CHOSEN_WIDE], orders),
    }
    for name, value in result.items():
        print(name, value)
    if given.out:
        write_json(given.out, result)


if __name__ == "__main__":
    main()
