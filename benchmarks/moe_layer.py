"""The MoE layer's expert compute against an eager dense SwiGLU FFN of the same active width, ours and other people's.

    python benchmarks/moe_layer.py [--quick] [--json FILE]

2,048 tokens, forward and backward to everything, a new routing every step as in training, balanced and Zipf. Within a cell
all implementations alternate in random order and get the same share of the time; medians. `ratio` is the median over
rounds of an implementation's time divided by the dense FFN's of the same round, so that a busy machine slows both.
`bound` is the one-sided 95 % bound on the median of mue-native's time over this implementation's, again round by round: at
most 1.03 means that ours is not slower.

`share` is an implementation's arithmetic in that time over the machine's peak, the best of several large products of torch in
that precision just before. `memory_mb` is by how much the process grows in a step (gradients included, what a backend keeps
between calls not), `kept_mb` what the forward keeps for the backward. Rows are printed, and written, cell by cell.

Peers are in `peers.py`; those that are not installed are named and left out. With a GPU the cells are larger, in bf16,
and 8 to 256 experts at 8 active are compared with the dense FFN; nothing of that has been run by us yet.

Where the system does not spread threads over the cores (seen on a 2-core virtual machine) both OpenMP threads spin on
one core and every small product pays for it: set OMP_PROC_BIND=true. The environment is recorded in the JSON.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

import peers
from mue.kernels import library
from mue.lab.doctor import limits
from mue.lab.doctor.timing import Bench, Case, Step, draw_routing, measure, median_ratio, ratios, upper_bound
from mue.lab.train.provenance import provenance
from mue.moe import MoELayer, Router, Routing
from mue.util.files import write_json

# Small, middle and large, each in bf16 and float32, cheapest first.
SHAPES = ((128, 128, 16, 4), (256, 256, 32, 8), (512, 256, 64, 8))
CELLS = [Case(*shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
CUDA_CELLS = [
    Case(1024, 512, number, 8, torch.bfloat16, tokens=16384, device="cuda") for number in (8, 32, 64, 128, 256)
]
QUICK_SECONDS = 30.0  # no new cell starts after this


def steps_of(bench: Bench, kind: str, skip: list[str]) -> tuple[dict[str, Step], dict[str, str]]:
    """Every implementation that can run this cell, and why the others cannot."""
    case, left_out = bench.case, {}
    steps = {"dense-eager": bench.dense(), "mue-portable": bench.backend("portable")}
    if case.device == "cuda":
        steps["mue-grouped_mm"] = bench.backend("grouped_mm")
    elif library.loaded() is not None:
        steps["mue-native"] = bench.backend("native")
    else:
        left_out["mue-native"] = "not built: run `mue doctor --build`"
    if kind == "fresh":  # it routes for itself
        steps["mue-layer"] = whole_layer(bench)
    if case.device == "cpu":
        steps["mue-reference"] = bench.backend("reference")
    for name, build in peers.PEERS.items():
        reason = peers.refusal(name, bench)
        if reason is None:
            steps[name] = build(bench)
        else:
            left_out[name] = reason
    return {name: step for name, step in steps.items() if name not in skip}, left_out


def whole_layer(bench: Bench) -> Step:
    """Our MoELayer with its own router and statistics; the other rows get their routing from outside."""
    case = bench.case
    router = Router(case.width, case.number, case.active, route_scale=case.active)
    layer = MoELayer(case.width, router, case.inner).to(case.device)
    return bench.step(lambda _: layer(bench.x_TD)[0], layer.parameters())


def measured(case: Case, kind: str, seconds: float, least: int, skip: list[str], seed: int) -> list[dict[str, object]]:
    """One cell's rows."""
    generator = torch.Generator().manual_seed(seed)

    def routing() -> Routing:
        return draw_routing(case, kind, generator)

    steps, left_out = steps_of(Bench(case), kind, skip)
    for name, reason in left_out.items():
        print(f"    {name}: {reason}")
    given = routing()
    tensors = [value for value in vars(given).values() if isinstance(value, torch.Tensor)]
    kept = {name: limits.kept_bytes(partial(step, given), *tensors) for name, step in steps.items()}
    grown = {name: limits.step_memory(partial(step, given)) for name, step in steps.items()}
    peak = limits.peak(case.dtype, case.device)
    times = measure(steps, routing, seconds, least)
    flop = 2 * 3 * 3 * case.tokens * case.active * case.width * case.inner  # three matrices, forward and twice backward
    ours = times.get("mue-grouped_mm" if case.device == "cuda" else "mue-native")
    rows = []
    for name, took in times.items():
        paired = ratios(took, times["dense-eager"])
        quarter = len(paired) // 4  # quartiles, since a mean or a range would be that of the worst interruption
        rows.append(
            {
                "impl": name, "shape": case.shape, "tokens": case.tokens, "dtype": case.dtype_name, "routing": kind,
                "ms": round(statistics.median(took), 3), "ratio": round(median_ratio(took, times["dense-eager"]), 3),
                "ratio_quartiles": [round(paired[quarter], 3), round(paired[-1 - quarter], 3)], "rounds": len(took),
                "bound": None if ours is None else round(upper_bound(ratios(ours, took)), 3),
                "peak_gflops": round(peak, 1), "share": round(flop / statistics.median(took) / peak / 1e6, 3),
                "memory_mb": megabytes(grown[name]), "kept_mb": megabytes(kept[name]),
            }
        )  # fmt: skip
    return rows


def megabytes(count: int | None) -> float | None:
    return None if count is None else round(count / 2**20, 1)


def cell(rows: list[dict[str, object]]) -> str:
    """One cell's rows as they come."""
    lines = [f"    {'peak':<24}{rows[0]['peak_gflops']:>10} GFLOP/s"]
    lines.append(f"    {'':<24}{'ms':>10}{'ratio':>8}{'bound':>8}{'share':>8}{'memory':>9}{'kept':>8}")
    for row in rows:
        lines.append(
            f"    {row['impl']:<24}{row['ms']:>10}{row['ratio']:>8}{row['bound']!s:>8}{row['share']:>8}"
            f"{row['memory_mb']!s:>9}{row['kept_mb']!s:>8}"
        )
    return "\n".join(lines)


def table(rows: list[dict[str, object]]) -> str:
    """Ratios: implementations down, cells across."""
    cells = list(dict.fromkeys((r["shape"], r["dtype"], r["routing"]) for r in rows))
    names = list(dict.fromkeys(r["impl"] for r in rows))
    found = {(r["impl"], r["shape"], r["dtype"], r["routing"]): r["ratio"] for r in rows}
    lines = [" " * 24 + "".join(f"{cell[part]!s:>17}" for cell in cells) for part in range(3)]
    for name in names:
        values = (found.get((name, *cell)) for cell in cells)
        lines.append(f"{name:<24}" + "".join(f"{'-':>17}" if v is None else f"{v:>17.2f}" for v in values))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="end within a minute: fewer rounds, cheap cells first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, with machine and versions")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="only this one")
    parser.add_argument("--width", type=int, help="only the cells of this width")
    parser.add_argument("--routing", choices=["fresh", "zipf"], help="only this one")
    parser.add_argument("--skip", nargs="*", default=[], metavar="IMPL", help="leave out implementations")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each cell")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    rows: list[dict[str, object]] = []
    cases = [
        case
        for case in (CUDA_CELLS if torch.cuda.is_available() else CELLS)
        if options.dtype in (None, case.dtype_name) and options.width in (None, case.width)
    ]
    kinds = [options.routing] if options.routing else ["fresh", "zipf"]
    total = QUICK_SECONDS if options.quick else options.seconds * len(cases) * len(kinds)
    print(f"{len(cases) * len(kinds)} cells, {total / 60:.0f} minutes or a third more", flush=True)
    for case in cases:
        for kind in kinds:
            if options.quick and time.perf_counter() - started > QUICK_SECONDS:
                print(f"{case.shape} {case.dtype_name} {kind}: left out, --quick ran out of time on this machine")
                continue
            print(f"{case.shape} {case.dtype_name} {kind}", flush=True)
            slow = ["mue-reference", "transformers-eager"] if options.quick and case.width > 128 else []
            seconds, least = (2.0, 1) if options.quick else (options.seconds, 5)  # five: a median with quartiles
            found = measured(case, kind, seconds, least, [*options.skip, *slow], options.seed)
            print(cell(found), flush=True)
            rows += found
            if options.json:
                write_json(
                    options.json, {"command": " ".join(["python", *sys.argv]), **about(options.seed), "rows": rows}
                )
    print(table(rows))


def about(seed: int) -> dict[str, object]:
    """Where the numbers come from."""
    environment = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MKL_", "MALLOC_"))}
    return {**provenance(), "threads": torch.get_num_threads(), "seed": seed, "environment": environment}


if __name__ == "__main__":
    main()
