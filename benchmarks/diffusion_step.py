"""A step of the diffusion transformer against a language step of equal FLOPs, and of experts against dense ones of equal active width.

    python benchmarks/diffusion_step.py [--rounds 7] [--json docs/results/diffusion_step.json]

Forward, backward and optimizer on one thread; the two of a pair take turns in one run, and a ratio is the median over rounds of their
quotients, so that other work on the machine meets both alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mue
from mue.lab.models.diffusion import DiffusionModel
from mue.lab.models.language import LanguageModel
from mue.lab.train.provenance import provenance
from mue.util.files import write_json

ROOT = Path(__file__).resolve().parent.parent
TUNED = mue.HParams(lr=4e-3, weight_decay=0.02, init_std=0.1)
# pixels along a side, channels, pixels of a patch, width, layers, images of a step
SIZES = ((8, 1, 2, 64, 4, 128), (8, 1, 2, 128, 4, 128), (16, 3, 2, 128, 4, 32))


def stepper(shape: Any, batch: tuple[torch.Tensor, ...]) -> Callable[[], float]:
    """Seconds of a step of a model of this shape."""
    plan = mue.transfer(shape, shape, TUNED)
    model = (LanguageModel if shape.image is None else DiffusionModel)(shape, plan.multipliers)
    plan.init_(model)
    optimizer = torch.optim.AdamW(plan.param_groups(model), fused=True)

    def step() -> float:
        start = time.perf_counter()
        model(*batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.end_step_(1e-3)
        return time.perf_counter() - start

    return step


def ratio(of: Callable[[], float], to: Callable[[], float], rounds: int, per_flop: float = 1.0) -> dict[str, Any]:
    """Median quotient of their times, ``per_flop`` taken out; both take turns."""
    for one in (of, to):
        one(), one()
    pairs = [(of(), to()) for _ in range(rounds)]
    return {
        "ratio": round(statistics.median(a / b for a, b in pairs) / per_flop, 3),
        "ms": round(1e3 * statistics.median(a for a, _ in pairs), 2),
        "ms_other": round(1e3 * statistics.median(b for _, b in pairs), 2),
    }


def rows(rounds: int) -> list[dict[str, Any]]:
    found = []
    for size, channels, patch, width, layers, images in SIZES:
        image = mue.Image(size, channels, patch, classes=10)
        common = {"width": width, "layers": layers, "head_dim": 32}
        dit = mue.Dense(ffn=2 * width, image=image, **common)
        text = mue.Dense(ffn=2 * width, sequence=image.tokens, vocab=256, **common)
        moe = mue.MoE.parse("8e2a", expert=width, image=image, **common)
        draw = torch.Generator().manual_seed(0)
        x, v = (torch.randn(images, channels, size, size, generator=draw) for _ in range(2))
        of_images = x, torch.rand(images, generator=draw), torch.randint(11, (images,), generator=draw), v
        tokens = torch.randint(256, (images, image.tokens + 1), generator=draw)
        one, other = stepper(dit, of_images), stepper(text, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
        about = {"image": image.text, "width": width, "layers": layers, "tokens": images * image.tokens}
        flops = (
            dit.flops_per_token / text.flops_per_token
        )  # as many tokens: what differs is the head and the modulations
        found.append(
            {"pair": "diffusion / language", **about, "flops": round(flops, 3), **ratio(one, other, rounds, flops)}
        )
        found.append({"pair": "8e2a / dense", **about, **ratio(stepper(moe, of_images), one, rounds)})
        for row in found[-2:]:
            print(row, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = rows(given.rounds)
    if given.json:
        command = f"python benchmarks/diffusion_step.py --rounds {given.rounds}"
        write_json(given.json, {"rows": found, "command": command, **provenance()})


if __name__ == "__main__":
    main()
