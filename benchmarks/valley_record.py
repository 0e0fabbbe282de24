"""Record real sweeps of the lab: fine lr grids with several seeds and the training curve of every run.

    python benchmarks/valley_record.py [--store runs/recorded] [--out benchmarks/recorded/sweeps.json]
    python benchmarks/valley_record.py --wide [--out benchmarks/recorded/wide.json]

The second are other bases over twelve octaves, as somebody sweeps who knows nothing. Half an hour of one core each;
interrupt and start again as you like. ``benchmarks/valley_search.py`` is built on the result.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mue
from mue.lab.data import Corpus
from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.sweep.spec import base_plan
from mue.lab.train.provenance import provenance
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.session import train
from mue.shapes import HParams, Training
from mue.util.files import write_json

ROOT = Path(__file__).resolve().parent.parent
# Six octaves in steps of a half: finer than a fit needs, so that what it makes of fewer can be held against all.
LOG2_LR = tuple(-9 + i / 2 for i in range(13))
SEEDS = (0, 1, 2)
# Twelve octaves in whole ones, as somebody sweeps who knows nothing; their walls over six octaves would be guesses.
WIDE = tuple(float(x) for x in range(-13, 0))
MORE_SEEDS = tuple(range(3, 12))  # of the first cell, on every other learning rate: how noise depends on lr
_CHEAP = 15  # so many of the cells are small: recorded first
EVERY = 5  # steps between points of a curve


@dataclass(frozen=True)
class Cell:
    """One base with one weight decay and init std: what a sweep over lr is made for."""

    width: int = 32
    ffn: int = 32
    layers: int = 2
    steps: int = 100
    batch: int = 512
    schedule: str = "wsd"
    warmup: float = 0.1
    weight_decay: float = 0.1
    init_std: float = 0.1


def cells() -> list[Cell]:
    """Nine cells of one base (weight decay × init std), then one change of the base at a time."""
    small = Cell()
    joint = [replace(small, weight_decay=wd, init_std=std) for std in (0.1, 0.03, 0.3) for wd in (0.1, 1.0, 4.0)]
    changes: list[dict[str, Any]] = [
        {"ffn": 128, "schedule": "cosine"},
        {"batch": 256},
        {"warmup": 0.3},
        {"width": 48, "ffn": 48, "layers": 3},
        {"steps": 200},
        {"width": 64, "ffn": 64, "layers": 3},
        {"layers": 6},
    ]
    return joint + [replace(small, **c, init_std=std) for c in changes for std in (0.1, 0.03)]


def wide() -> list[Cell]:
    """Bases that are not among ``cells``."""
    small = Cell(ffn=64)
    changes: list[dict[str, Any]] = [
        {},
        {"init_std": 0.03, "schedule": "cosine"},
        {"batch": 1024, "steps": 60},
        {"layers": 4},
        {"weight_decay": 1.0, "layers": 3},
        {"steps": 150, "schedule": "cosine"},
        {"width": 48, "warmup": 0.05},
        {"init_std": 0.3, "ffn": 32},
        {"width": 64, "ffn": 128, "init_std": 0.03},
        {"batch": 256, "steps": 160, "weight_decay": 0.0},
        {"width": 48, "ffn": 96, "layers": 4, "schedule": "cosine"},
        {"ffn": 128, "warmup": 0.3, "weight_decay": 2.0},
    ]
    return [replace(small, **c) for c in changes]


def run_of(cell: Cell, log2_lr: float, seed: int, data: dict[str, Any]) -> Run:
    base = mue.Dense(width=cell.width, ffn=cell.ffn, layers=cell.layers, head_dim=16, sequence=64)
    tuned = HParams(lr=2.0**log2_lr, weight_decay=cell.weight_decay, init_std=cell.init_std, warmup=cell.warmup)
    plan = base_plan(base, Training(batch=cell.batch, steps=cell.steps), tuned)
    return Run(plan, Settings(seed=seed, schedule=cell.schedule, eval_sequences=64, log_every=EVERY), data)


def wide_jobs() -> Iterator[tuple[int, float, int]]:
    """As :func:`jobs`, of the wide sweeps."""
    yield from ((i, x, seed) for i in range(len(wide())) for seed in SEEDS for x in WIDE)


def jobs() -> Iterator[tuple[int, float, int]]:
    """(cell, log2 lr, seed), in whole sweeps, so that an interrupted recording is of use."""
    yield from ((0, x, seed) for seed in MORE_SEEDS for x in LOG2_LR[::2])
    small, large = range(_CHEAP), range(_CHEAP, len(cells()))
    yield from ((i, x, seed) for seed in SEEDS for i in small for x in LOG2_LR)
    yield from ((i, x, seed) for i in large for seed in SEEDS for x in LOG2_LR)


def record(
    chosen: list[Cell], jobs: Iterable[tuple[int, float, int]], store: Store, corpus: Corpus, data: dict[str, Any]
) -> list[dict[str, Any]]:
    """Every cell with its runs: log2 lr, seed, validation loss (null: diverged), seconds, curve of training losses."""
    out = [{**asdict(cell), "runs": []} for cell in chosen]
    for i, x, seed in jobs:
        run = run_of(chosen[i], x, seed, data)
        result = train(run, store, corpus)
        curve = [row["loss"] for row in store.metrics(run.key) if row["step"] % EVERY == 0]
        rounded = [round(y, 3) if math.isfinite(y) else None for y in curve]
        loss = result["val_loss"]
        row = {"log2_lr": x, "seed": seed, "loss": None if loss is None else round(loss, 5)}
        out[i]["runs"].append({**row, "seconds": result["seconds"], "curve": rounded})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=ROOT / "runs/recorded")
    parser.add_argument("--wide", action="store_true", help="the sweeps over twelve octaves")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = {"source": "stdlib", "cache": str(given.store / "data")}
    corpus = open_corpus(source)
    data = describe_data(source, corpus)
    chosen, work = (wide(), wide_jobs()) if given.wide else (cells(), jobs())
    found = record(chosen, work, Store(given.store), corpus, data)
    command = "python benchmarks/valley_record.py" + " --wide" * given.wide
    result = {"every": EVERY, "data": corpus.hash, "command": command, **provenance()}
    result["cells"] = found
    out = given.out or ROOT / "benchmarks/recorded" / ("wide.json" if given.wide else "sweeps.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(f"{sum(len(c['runs']) for c in found)} runs, {sum(r['seconds'] for c in found for r in c['runs']):.0f} s")


if __name__ == "__main__":
    main()
