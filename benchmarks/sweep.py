"""How fast a sweep's runs are trained: one after the other, in processes, stacked, compiled, and in the layout the runner chooses.

    python benchmarks/sweep.py [--device cpu|cuda] [--case d128-bf16] [--quick] [--json FILE]

A CPU: d64 and d128 proxies of 8 layers, fp32 and bf16. A GPU: the d128 proxy, 32 variants. Every layout is trained by the lab's own worker processes
on real text; the layouts take turns of a few seconds (those not in turn are paused), so that a machine whose speed drifts drifts under all of
them. The figures are medians over the turns. What they are compared with is one run after the other with all cores, eagerly: as the lab trains it
(`times_sequential`), and on a CPU also by torch's operators alone, without the native kernel (`times_torch`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch

import mue
from mue.kernels import library
from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.runners.calibrate import STACK, Calibration, cores, endless, gpus
from mue.lab.runners.pool import Pool, WorkerLayout
from mue.lab.runners.runner import Progress
from mue.lab.sweep.spec import base_plan
from mue.lab.train.provenance import provenance
from mue.lab.train.run import Run, Settings, Store
from mue.util.files import write_json

RUNS, STEPS = 27, 1000  # the sweep that the runner is asked to lay out: nine learning rates with three seeds
SEQUENTIAL = "one after the other, eager"
TORCH = f"{SEQUENTIAL}, torch's operators"


@dataclass
class Layout:
    """A way to train the runs, and its runs under way, paused between turns."""

    name: str
    pool: Pool

    def begin(self, example: Run, steps: int) -> float:
        """Start endless runs and wait until each has done so many steps; seconds that took."""
        started = time.monotonic()
        runs = [endless(example, seed) for seed in range(self.pool.slots)]
        with without_kernel() if self.name == TORCH else nullcontext():
            for run in runs:
                self.pool.submit(run)
        left = {run.key for run in runs}
        while left:
            left -= {m.key for m in self.pool.wait() if isinstance(m, Progress) and m.step >= steps}
        self.signal(signal.SIGSTOP)
        return time.monotonic() - started

    def turn(self, seconds: float) -> float:
        """Steps per second of all its runs, each from its first to its last step in this turn."""
        self.pool.wait(0.01)  # what was said before the pause does not count
        self.signal(signal.SIGCONT)
        until = time.monotonic() + seconds
        seen: dict[str, list[float]] = {}
        while time.monotonic() < until or len(seen) < self.pool.slots or min(map(len, seen.values())) < 3:
            for message in self.pool.wait(1.0):
                if isinstance(message, Progress):
                    seen.setdefault(message.key, []).append(time.monotonic())
        self.signal(signal.SIGSTOP)
        return sum((len(times) - 1) / (times[-1] - times[0]) for times in seen.values())

    def signal(self, number: int) -> None:
        for worker in self.pool.workers:
            os.kill(worker.pid, number)


@contextmanager
def without_kernel() -> Iterator[None]:
    """Processes started meanwhile look for the kernel where there is none."""
    with tempfile.TemporaryDirectory() as nothing, patch.dict(os.environ, MUE_CACHE=nothing):
        yield


def layouts(device: str, stack: int) -> dict[str, WorkerLayout]:
    """What is compared."""
    alone = WorkerLayout(1, cores(), devices=gpus()[:1])
    stacked = replace(alone, stack=stack)
    named = {
        SEQUENTIAL: alone,
        "stacked, eager": stacked,
        "stacked, compiled": replace(stacked, compiled=True),
    }
    if device == "cuda":
        return named | {"one after the other, compiled": replace(alone, compiled=True)}
    apart = WorkerLayout(cores(), 1)
    named |= {TORCH: alone} if library.loaded() else {}
    return named | {"processes, eager": apart, "processes, compiled": replace(apart, compiled=True)}


def measure(example: Run, device: str, stack: int, turns: int, seconds: float) -> list[dict[str, object]]:
    """A row for each layout, and which of them the runner chose and why."""
    assert example.plan.training is not None
    with Calibration(example, cores(), gpus()) as calibration:
        mode, why = calibration.best("auto", RUNS, RUNS * STEPS)
    named = layouts(device, stack)
    if mode not in named.values():
        named["the runner's choice"] = mode
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # 1e9: no checkpoint falls into a turn.
        made = [Layout(name, Pool(m, Store(Path(folder) / str(i)), 1e9)) for i, (name, m) in enumerate(named.items())]
        try:
            ready = {layout.name: layout.begin(example, 3) for layout in made}
            rates: dict[str, list[float]] = {layout.name: [] for layout in made}
            for _ in range(turns):
                for layout in made:
                    rates[layout.name].append(layout.turn(seconds))
        finally:
            for layout in made:
                layout.pool.close()
    for name, m in named.items():
        ratios = {
            base: sorted(a / b for a, b in zip(rates[name], rates[base], strict=True))
            for base in (SEQUENTIAL, TORCH)
            if base in rates
        }
        ours = ratios[SEQUENTIAL]
        rows.append(
            {
                "run": f"{example.plan.target.name}, batch {example.plan.training.batch}, {example.settings.precision}",
                "layout": name,
                "mode": asdict(m),
                "steps_per_second": round(statistics.median(rates[name]), 3),
                "times_sequential": round(statistics.median(ours), 3),
                "range": [round(ours[0], 3), round(ours[-1], 3)],
                **({"times_torch": round(statistics.median(ratios[TORCH]), 3)} if TORCH in ratios else {}),
                "ready_seconds": round(ready[name], 1),
                "chosen": m == mode and name != TORCH,
                **({"why": why} if m == mode and name != TORCH else {}),
                "git": provenance()["git"],
            }
        )
    return rows


def examples(device: str, cache: Path, case: str | None = None) -> list[Run]:
    """The dense proxies of this device's claim, or the one of this name."""
    source = {"source": "stdlib", "cache": str(cache)}
    data = describe_data(source, open_corpus(source))
    tuned = mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.1)
    cases = [(d, p) for d in ((64, 128) if device == "cpu" else (128,)) for p in ("fp32", "bf16")]
    training = mue.Training(2048 if device == "cpu" else 4096, STEPS)
    return [
        Run(base_plan(mue.Dense(d, d, 8, head_dim=32, sequence=128), training, tuned), Settings(precision=p), data)
        for d, p in cases
        if case in (None, f"d{d}-{p}")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", help="only this one; the other rows of --json stay as they are")
    parser.add_argument("--quick", action="store_true", help="two short turns")
    parser.add_argument("--json", type=Path, help="also write the rows and the machine here")
    arguments = parser.parse_args()
    if (arguments.device == "cuda") != torch.cuda.is_available():
        sys.exit(
            f"--device {arguments.device}: here torch finds {torch.cuda.device_count()} GPUs (hide them with CUDA_VISIBLE_DEVICES=)"
        )
    turns, seconds = (2, 1.0) if arguments.quick else (5, 2.0)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for example in examples(arguments.device, Path(folder), arguments.case):
            for row in measure(example, arguments.device, STACK if arguments.device == "cpu" else 32, turns, seconds):
                rows.append(row)
                print(json.dumps({k: v for k, v in row.items() if k != "mode"}), flush=True)
    if arguments.json:
        fresh = {row["run"] for row in rows}
        old = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() and arguments.case else []
        rows = [row for row in old if row["run"] not in fresh] + rows
        command = f"python benchmarks/sweep.py --device {arguments.device}{' --quick' * arguments.quick}"
        write_json(arguments.json, {"command": command, **provenance(), "rows": rows})


if __name__ == "__main__":
    main()
