"""What Muon costs: a whole training step against one with AdamW, and Newton–Schulz batched against one matrix after the other.

    python benchmarks/muon.py [--quick] [--coordinates] [--json FILE]

Seconds of the processor's time, on one thread; both sides of a comparison alternate. A step is forward, backward and the optimizer on
8,192 fresh random bytes; `ratio` is the median over rounds of the step with Muon over AdamW's of the same round. Newton–Schulz of all
experts at once is compared with the library's own of one after the other, and with Keller's as torch.optim.Muon has it, in float32; of
several tries each side's quickest counts. `--coordinates` trains small models along every axis instead, six steps each on made
text, and prints how the update of every module moves with size (docs/checks.md).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mue
from mue.lab.models.language import LanguageModel
from mue.lab.train.provenance import provenance
from mue.lab.train.step import planned_optimizer
from mue.model.muon import EPS, STEPS, A, B, C, newton_schulz, orthogonal
from mue.util.files import write_json

TOKENS, LENGTH, LAYERS = 8192, 128, 4
SHAPES = ((128, 32), (128, 128), (256, 64), (256, 256))  # width, expert's: an active width of d, and of 4·d
MATRICES = ((32, 64, 32), (32, 256, 64), (32, 256, 128))  # experts, rows, columns: d64 and d256


def stepper(target: mue.MoE, optimizer: str) -> Callable[[], None]:
    """A training step of a planned model; its data are fresh at every call."""
    tuned = mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.1, optimizer=optimizer)
    plan = mue.transfer(mue.Dense(64, 64, LAYERS, head_dim=32), target, tuned)
    model = LanguageModel(plan.target, plan.multipliers)
    plan.init_(model)
    moved = planned_optimizer(plan, model)
    noise = torch.Generator().manual_seed(0)

    def step() -> None:
        tokens = torch.randint(256, (TOKENS // LENGTH, LENGTH), generator=noise)
        loss = model(tokens, tokens).loss
        assert loss is not None
        loss.backward()  # type: ignore[no-untyped-call]
        moved.step()
        moved.zero_grad(set_to_none=True)
        model.end_step_(1e-3)

    return step


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Of the processor, for one of so many calls."""
    started = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - started) / times


def steps(width: int, expert: int, rounds: int) -> dict[str, Any]:
    """A row: both optimizers' steps, one of each in every round."""
    target = mue.MoE.parse("16e4a", width=width, expert=expert, layers=LAYERS, head_dim=32, sequence=LENGTH)
    both = {name: stepper(target, name) for name in ("adamw", "muon")}
    for step in both.values():  # first touches, and the optimizer's state
        step()
    took = {name: [0.0] * rounds for name in both}
    for i in range(rounds):
        for name, step in both.items():
            took[name][i] = seconds(step)
    ratios = [muon / adamw for adamw, muon in zip(took["adamw"], took["muon"], strict=True)]
    return {
        "what": "step", "shape": target.name, "expert": expert, "tokens": TOKENS, "rounds": rounds,
        "ratio": round(statistics.median(ratios), 3), **{f"{name}_ms": round(1e3 * min(t), 1) for name, t in took.items()},
    }  # fmt: skip


def keller(x: torch.Tensor) -> torch.Tensor:
    """Newton–Schulz of one matrix as torch.optim.Muon iterates, in float32."""
    if x.size(0) > x.size(1):
        return keller(x.T).T
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


def iterations(experts: int, rows: int, columns: int, rounds: int) -> dict[str, Any]:
    """A row: Newton–Schulz of all experts together and of one after the other."""
    x = torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(0))
    times = 10 if rows * columns < 10_000 else 2
    ways: dict[str, Callable[[], object]] = {
        "batched": lambda: orthogonal([x]),
        "one after another": lambda: [newton_schulz(one) for one in x],
        "keller": lambda: [keller(one) for one in x],
    }
    best = {name: min(seconds(way, times) for _ in range(rounds)) for name, way in ways.items()}
    return {
        "what": "newton-schulz", "experts": experts, "rows": rows, "columns": columns,
        "speed_up": round(best["one after another"] / best["batched"], 2),
        "over_keller": round(best["keller"] / best["batched"], 2),
        **{f"{name.replace(' ', '_')}_ms": round(1e3 * took, 2) for name, took in best.items()},
    }  # fmt: skip


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight sequences that count on in steps of 1 to 3, a tenth of their tokens random."""
    noise = torch.Generator().manual_seed(step + 1)
    start, stride = (torch.randint(low, high, (8, 1), generator=noise) for low, high in ((0, 64), (1, 4)))
    tokens = (start + stride * torch.arange(33)) % 64
    drawn = torch.randint(64, tokens.shape, generator=noise)
    tokens = torch.where(torch.rand(tokens.shape, generator=noise) < 0.1, drawn, tokens)
    return tokens[:, :-1], tokens[:, 1:]


def coordinates(quick: bool) -> dict[str, Any]:
    """The slopes of every module's update under Muon, along every axis."""
    sizes: dict[str, Any] = {"head_dim": 16, "sequence": 32, "vocab": 64}

    def moe(notation: str = "8e2a", width: int = 64, expert: int = 32) -> mue.MoE:
        return mue.MoE.parse(notation, width=width, expert=expert, layers=2, **sizes)

    axes: dict[str, list[Any]] = {
        "width": [moe(width=w, expert=w // 2) for w in (32, 64, 128)],
        "depth": [mue.Dense(64, 64, layers, **sizes) for layers in (8, 16, 32)],
        "experts": [moe(f"{n}e2a") for n in (4, 8, 16)],
        "active": [moe(f"16e{a}a") for a in (2, 4, 8)],
        "granularity": [moe(f"{4 * k}e{k}a", expert=128 // k) for k in (2, 4, 8)],
        "expansion": [mue.Dense(64, ffn, 2, **sizes) for ffn in (64, 128, 256)],
    }
    tuned = mue.HParams(lr=0.02, adamw_lr=4e-3, weight_decay=0.1, init_std=0.1, optimizer="muon")
    base = mue.Dense(64, 64, 2, **sizes)
    plan = partial(mue.transfer, base, tuned=tuned)
    found = mue.coordinate_check(
        lambda shape: LanguageModel(shape, plan(shape).multipliers), plan, axes, batch,
        steps=6, seeds=(0,) if quick else (0, 1), raises=False,
    )  # fmt: skip
    print(found)
    return found.to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few rounds: seconds, and numbers that are off by some percent"
    )
    parser.add_argument("--coordinates", action="store_true", help="slopes of updates with size, and no times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = {"command": " ".join(["python", *sys.argv]), **provenance()}
    if options.coordinates:
        written = coordinates(options.quick)
    else:
        found = [iterations(*sizes, rounds=3 if options.quick else 9) for sizes in MATRICES]
        found += [steps(*sizes, rounds=2 if options.quick else 5) for sizes in SHAPES]
        for row in found:
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        written = {"rows": found}
    if options.json:
        write_json(options.json, {**about, **written})


if __name__ == "__main__":
    main()
