"""What choosing experts costs, router by router: its part of the layer, and the layer against plain top-k's.

    python benchmarks/routers.py [--rounds N] [--json FILE]

2,048 tokens, forward and backward to everything, the losses of each router included. All routers alternate in random order; ratios are
medians over rounds, each of two times of the same round. Times are the process's own (CPU seconds), so that another process
on the machine costs cache and no more. Routers whose number of experts differs by token are set such that its mean is that of the
others. Goals: choosing at most 10 % of the layer, a ragged layer at most 1.2 times top-k's.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mue.lab.train.provenance import provenance
from mue.moe import MoELayer
from mue.moe.routers.at_init import at_init
from mue.moe.routers.base import ROUTER_CLASSES, RouterInput, RouterOptions
from mue.shapes import Block
from mue.util.files import write_json

TOKENS = 2048
SHAPES = ((128, 128, 16, 4), (256, 256, 32, 8))  # width, expert, experts, active
BASELINE = "softmax"


def mass_of(active: int, experts: int) -> float:
    """The p at which logits of std 1 have so many experts on average."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if at_init(experts, middle, 1.0).active < active else (low, middle)
    return high


def layers_of(width: int, expert: int, experts: int, active: int) -> dict[str, MoELayer]:
    """A layer for each router that has such numbers; why the others have none is printed."""
    settings: Mapping[str, Mapping[str, Any]] = {"top-p": {"p": mass_of(active, experts)}}
    layers = {}
    for name in ROUTER_CLASSES:
        try:
            block = Block(
                layers=1, expert=expert, experts=experts, active=active, router=name, router_settings=settings.get(name, {})
            )  # fmt: skip
            layer = MoELayer.from_block(block, width, RouterOptions(route_scale=float(active)))
        except ValueError as error:
            print(f"    {name}: left out ({error})")
            continue
        for parameter in layer.router.parameters() if layer.router is not None else ():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=width**-0.5)  # logits of std 1
        layers[name] = layer
    return layers


def steps_of(layer: MoELayer, x_TD: torch.Tensor, given: RouterInput) -> dict[str, Callable[[], object]]:
    """The whole layer, and its router alone."""
    given = given if layer.router is not None and layer.router.kind.needs_tokens else None  # type: ignore[assignment]
    dy_TD = torch.randn_like(x_TD)

    def whole() -> None:
        y_TD, routing = layer(x_TD, given=given)
        losses = list(routing.losses.values())
        torch.autograd.backward([y_TD, *losses], [dy_TD, *map(torch.ones_like, losses)])

    def choosing() -> None:
        routing = layer.route(x_TD, given)
        ends = [end for end in (routing.weight_P, *routing.losses.values()) if end.requires_grad]
        if ends:
            torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])

    return {"layer": whole, "choosing": choosing}


def measured(shape: tuple[int, int, int, int], rounds: int) -> list[dict[str, object]]:
    """One shape's rows."""
    width, expert, experts, active = shape
    x_TD = torch.randn(TOKENS, width, requires_grad=True)
    given, layers = RouterInput(torch.randint(256, (TOKENS,))), layers_of(*shape)
    steps = {
        (name, what): step for name, layer in layers.items() for what, step in steps_of(layer, x_TD, given).items()
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for turn in range(rounds + 2):
        for key in random.sample(list(steps), len(steps)):
            for leaf in (x_TD, *layers[key[0]].parameters()):
                leaf.grad = None
            begin = time.process_time()
            steps[key]()
            if turn >= 2:  # warm
                times[key].append(time.process_time() - begin)
    rows: list[dict[str, object]] = []
    for name, layer in layers.items():
        load = layer.route(x_TD, given if layer.router is not None and layer.router.kind.needs_tokens else None).stats[
            "load"
        ]
        whole, alone, plain = times[name, "layer"], times[name, "choosing"], times[BASELINE, "layer"]
        rows.append(
            {
                "router": name, "shape": f"d{width}h{expert}N{experts}a{active}", "mean_active": round(float(load.sum()) / TOKENS, 2),
                "layer_ms": round(1e3 * statistics.median(whole), 2), "choosing_ms": round(1e3 * statistics.median(alone), 2),
                "choosing_part": round(statistics.median(a / w for a, w in zip(alone, whole, strict=True)), 4),
                "against_top_k": round(statistics.median(w / p for w, p in zip(whole, plain, strict=True)), 3), "rounds": rounds,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, with machine and versions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    rows = []
    for shape in SHAPES:
        rows += measured(shape, options.rounds)
    for row in rows:
        print(
            f"{row['shape']:<16}{row['router']:<15} a {row['mean_active']:>5}  layer {row['layer_ms']:>7} ms  × {row['against_top_k']:<6}"
            f" choosing {row['choosing_ms']:>6} ms, {100 * float(str(row['choosing_part'])):.1f} %"
        )
    if options.json:
        environment = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MKL_", "MALLOC_"))}
        about = {**provenance(), "threads": torch.get_num_threads(), "seed": options.seed, "environment": environment}
        write_json(options.json, {"command": " ".join(["python", *sys.argv]), **about, "rows": rows})


if __name__ == "__main__":
    main()
