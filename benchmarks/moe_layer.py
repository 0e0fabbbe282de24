"""Forward + backward of the MoE layer's expert compute against an eager dense SwiGLU FFN of the same active width.

    python benchmarks/moe_layer.py [--quick] [--json FILE]

2,048 tokens, a new routing every step (as in training), balanced and Zipf. Within one cell the implementations
alternate in random order; medians. `ratio` is the median over rounds of this implementation's time divided by the
dense FFN's time of the same round, so that a busy machine slows both. `mue-layer` is the whole `MoELayer`, router and
statistics included; the other rows get their routing from outside.
Rows: {impl, shape, tokens, dtype, routing, ms, ratio}.

Where the kernel does not spread threads over the cores (seen on a 2-core virtual machine) both OpenMP threads spin on
one core and every small product pays for it: set OMP_PROC_BIND=true. The environment is recorded in the JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.moe import ExpertWeights, MoELayer, Routing, experts

TOKENS = 2048
QUICK_SECONDS = 30.0  # no new cell starts after this, the last one may take as long again
# (width, expert width, experts, active, dtype): the columns of issue 4's table and their float32 twins, cheapest first.
CELLS = [
    (128, 128, 16, 4, torch.float32),
    (128, 128, 16, 4, torch.bfloat16),
    (256, 256, 32, 8, torch.float32),
    (512, 256, 64, 8, torch.float32),
    (256, 256, 32, 8, torch.bfloat16),
    (512, 256, 64, 8, torch.bfloat16),
]
Step = Callable[[Routing], None]


def draw_routing(kind: str, number: int, active: int, generator: torch.Generator) -> Routing:
    """A routing of TOKENS tokens: "fresh" is balanced in expectation, "zipf" prefers expert i as 1/(i+1)."""
    uniform_TN = torch.rand(TOKENS, number, generator=generator)
    score_TN = -torch.log(
        -torch.log(uniform_TN.clamp(1e-9, 1 - 1e-7))
    )  # Gumbel noise: top-k samples without replacement
    if kind == "zipf":
        score_TN -= torch.log(torch.arange(1, number + 1))
    expert_TK = score_TN.topk(active, dim=1).indices
    weight_TK = torch.rand(TOKENS, active, generator=generator).softmax(1) * active
    return Routing.from_topk(expert_TK, weight_TK.requires_grad_(), number, route_scale=active, stats=False)


def build(width: int, inner: int, number: int, active: int, dtype: torch.dtype) -> dict[str, Step]:
    """One forward + backward step per implementation, all on the same input and output gradient."""
    x_TD = torch.randn(TOKENS, width, requires_grad=True)
    dy_TD = torch.randn(TOKENS, width)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape).div_(shape[-1] ** 0.5).requires_grad_()

    gate, up, down = matrix(active * inner, width), matrix(active * inner, width), matrix(width, active * inner)
    routed = [matrix(number, inner, width), matrix(number, inner, width), matrix(number, width, inner)]
    layer = MoELayer(width, number, active, expert_width=inner, route_scale=active)

    def step(forward: Callable[[Routing], Tensor], weights: list[Tensor]) -> Step:
        def run(routing: Routing) -> None:
            for weight in (x_TD, *weights):
                weight.grad = None
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                y_TD = forward(routing)
            torch.autograd.backward(y_TD, dy_TD.to(y_TD.dtype))

        return run

    def dense(_: Routing) -> Tensor:
        y_TD: Tensor = F.linear(F.silu(F.linear(x_TD, gate)) * F.linear(x_TD, up), down)
        return y_TD

    def whole(_: Routing) -> Tensor:
        y_TD: Tensor = layer(x_TD)[0]
        return y_TD

    def grouped(backend: str) -> Callable[[Routing], Tensor]:
        return lambda routing: experts(x_TD, routing, ExpertWeights(*routed), backend=backend)

    return {
        "dense-eager": step(dense, [gate, up, down]),
        "mue-portable": step(grouped("portable"), routed),
        "mue-layer": step(whole, list(layer.parameters())),
        "mue-reference": step(grouped("reference"), routed),
    }


def measure(
    steps: dict[str, Step], routings: Callable[[], Routing], seconds: float, rounds: tuple[int, int]
) -> dict[str, tuple[float, float]]:
    """impl -> (median ms, median ratio to dense), over at least rounds[0] and at most rounds[1] alternating rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name in steps:
        steps[name](routings())
    end = time.perf_counter() + seconds
    while len(times["dense-eager"]) < rounds[0] or (
        time.perf_counter() < end and len(times["dense-eager"]) < rounds[1]
    ):
        for name in random.sample(list(steps), len(steps)):
            routing = routings()
            start = time.perf_counter()
            steps[name](routing)
            times[name].append((time.perf_counter() - start) * 1e3)
    base = times["dense-eager"]
    return {
        name: (statistics.median(took), statistics.median(t / b for t, b in zip(took, base, strict=True)))
        for name, took in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, with machine and versions")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="only this one")
    parser.add_argument("--skip", nargs="*", default=[], metavar="IMPL", help="leave out implementations")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    seconds, rounds = (1.0, (2, 100)) if options.quick else (10.0, (15, 300))
    deadline = time.perf_counter() + QUICK_SECONDS
    rows: list[dict[str, object]] = []
    print(f"{'shape':<16} {'dtype':<9} {'routing':<7} {'impl':<14} {'ms':>9} {'ratio':>7}")
    for width, inner, number, active, dtype in CELLS:
        if options.dtype and str(dtype) != f"torch.{options.dtype}":
            continue
        shape, dtype_name = f"d{width}h{inner}N{number}a{active}", str(dtype).removeprefix("torch.")
        if options.quick and time.perf_counter() > deadline:
            print(f"{shape:<16} {dtype_name:<9} left out: --quick ran out of time on this machine")
            continue
        steps = build(width, inner, number, active, dtype)
        for name in options.skip:
            steps.pop(name, None)
        for kind in ("fresh", "zipf"):
            left_out = {"mue-layer"} if kind == "zipf" else set()  # it routes for itself
            if options.quick and (kind == "zipf" or width > 128):
                left_out.add("mue-reference")  # the oracle is slow, not a competitor
            chosen = {name: run for name, run in steps.items() if name not in left_out}
            found = measure(
                chosen,
                functools.partial(draw_routing, kind, number, active, generator),
                seconds,
                rounds,
            )
            for name, (ms, ratio) in found.items():
                print(f"{shape:<16} {dtype_name:<9} {kind:<7} {name:<14} {ms:9.2f} {ratio:7.2f}", flush=True)
                rows.append(
                    {"impl": name, "shape": shape, "tokens": TOKENS, "dtype": dtype_name, "routing": kind,
                     "ms": round(ms, 3), "ratio": round(ratio, 3)}
                )  # fmt: skip
    if options.json:
        about = {
            "command": " ".join(sys.argv), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine(), "seed": options.seed,
            "load": os.getloadavg(), "env": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MKL_"))},
        }  # fmt: skip
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
