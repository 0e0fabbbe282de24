"""Whole training steps of the lab's model: a MoE against the dense model of equal active width, in one run.

    python benchmarks/train_step.py [--quick] [--json FILE]

Steps alternate, so that a machine whose speed drifts drifts under both; the figure is the median of paired ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import mue
from mue.files import write_json
from mue.lab.model import LanguageModel
from mue.lab.train import provenance

SHAPES = {  # notation, width, expert width, layers, tokens per step
    "demo": ("16e4a1s", 128, 64, 4, 512),
    "d128": ("16e4a", 128, 128, 4, 2048),
    "d256": ("16e4a", 256, 128, 4, 2048),
}


def stepper(plan: mue.Plan, tokens: int) -> callable:
    """A function that takes one optimizer step on fresh random tokens."""
    model = LanguageModel(plan.target, plan.multipliers)
    plan.init_(model)
    optimizer = torch.optim.AdamW(plan.param_groups(model), fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        x = torch.randint(256, (tokens // plan.target.sequence, plan.target.sequence), generator=generator)
        started = time.perf_counter()
        model(x, x).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_bias_(1e-3)
        return time.perf_counter() - started

    return step


def compare(name: str, rounds: int) -> dict[str, object]:
    """Medians of MoE and dense steps and of their ratio."""
    notation, width, expert, layers, tokens = SHAPES[name]
    moe = mue.MoE.parse(notation, width=width, expert=expert, layers=layers, head_dim=32, sequence=128)
    dense = mue.Dense(width, moe.active_width, layers, head_dim=32, sequence=128)
    tuned = mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.1)
    steps = [stepper(mue.transfer(mue.Dense(64, 64, 3, head_dim=32), shape, tuned), tokens) for shape in (moe, dense)]
    for step in steps:
        for _ in range(3):
            step()
    pairs = [(steps[0](), steps[1]()) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "shape": f"{moe.name}, expert {expert}",
        "tokens": tokens,
        "moe_ms": round(1e3 * statistics.median(a for a, _ in pairs), 2),
        "dense_ms": round(1e3 * statistics.median(b for _, b in pairs), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[3 * len(ratios) // 4], 3)],
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds of each, under a minute")
    parser.add_argument("--json", type=Path, help="also write the rows and the machine here")
    arguments = parser.parse_args()
    rows = []
    for name in SHAPES:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            row = compare(name, 8 if arguments.quick else 30)
            rows.append(row)
            print(json.dumps(row))
    if arguments.json:
        write_json(arguments.json, {"command": "python benchmarks/train_step.py", **provenance(), "rows": rows})


if __name__ == "__main__":
    main()
