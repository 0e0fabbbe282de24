"""The coordinate check of diffusion transformers over width, depth, experts, active experts and granularity.

    python benchmarks/diffusion_coordinates.py [--seeds 2] [--out docs/results/diffusion_coordinates.json]

Updates of every module after ten steps, branches before their gates; beside the rule plain values along width, the control.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import torch

import mue
from mue.lab.models.diffusion import DiffusionModel
from mue.lab.train.provenance import provenance
from mue.util.files import write_json

ROOT = Path(__file__).resolve().parent.parent
IMAGE = mue.Image(size=8, channels=1, patch=2, classes=3)
BASE = mue.Dense(width=64, ffn=64, layers=4, head_dim=16, image=IMAGE)
TUNED = mue.HParams(lr=4e-3, weight_decay=0.02, init_std=0.1)


def dense(width: int = 32, layers: int = 4) -> mue.Dense:
    return mue.Dense(width=width, ffn=width, layers=layers, head_dim=16, image=IMAGE)


def moe(notation: str, expert: int = 32) -> mue.MoE:
    return mue.MoE.parse(notation, width=64, expert=expert, layers=4, head_dim=16, image=IMAGE)


AXES = {
    "width": [dense(w) for w in (64, 128, 256)],
    "depth": [dense(layers=layers) for layers in (8, 16, 24)],
    "experts": [moe(f"{n}e2a") for n in (4, 8, 16)],
    "active": [moe(f"16e{a}a", 64 // a) for a in (2, 4, 8)],
    "granularity": [moe(f"{4 * k}e{k}a", 128 // k) for k in (2, 4, 8)],
}


@cache
def batch(step: int) -> tuple[torch.Tensor, ...]:
    """x_t, times, classes and velocities of shapes on grey; the held batch is step -1."""
    from mue.lab.models import flow

    draw = torch.Generator().manual_seed(step + 1)
    label = torch.randint(3, (64,), generator=draw)
    stripe = torch.arange(8).remainder(4).lt(2).float() * 2 - 1
    kinds = torch.stack([stripe.expand(8, 8), stripe.expand(8, 8).T, torch.outer(stripe, stripe)])
    image, noise = kinds[label][:, None], torch.randn(64, 1, 8, 8, generator=draw)
    time = torch.randn(64, generator=draw).sigmoid()
    return flow.noised(image, noise, time), time, label, flow.velocity(image, noise)


def checked(axes: dict[str, list[Any]], rule: str, seeds: range) -> dict[str, Any]:
    def plan(shape: Any) -> mue.Plan:
        return mue.transfer(BASE, shape, TUNED, rule=rule)

    def build(shape: Any) -> DiffusionModel:
        return DiffusionModel(shape, plan(shape).multipliers, balance="none")

    found = mue.coordinate_check(build, plan, axes, batch, seeds=tuple(seeds), raises=False)
    print(rule, found, sep="\n")
    return {**found.to_dict(), "plans": {axis: [plan(s).hash for s in shapes] for axis, shapes in axes.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/diffusion_coordinates.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(given.seeds)
    rows = {"complete-mue": checked(AXES, "complete-mue", seeds)}
    rows["standard"] = checked({"width": AXES["width"]}, "standard", seeds)
    command = f"python benchmarks/diffusion_coordinates.py --seeds {given.seeds}"
    write_json(given.out, {"rules": rows, "command": command, **provenance()})


if __name__ == "__main__":
    main()
