"""10,000 finished trials: how long a worker takes to start, the listing, the report; on SQLite and on PostgreSQL.

    python benchmarks/trials.py [--trials 10000] [--postgresql URL] [--json docs/results/trials.json]

Each row is a process of its own from its start to its end, imports and all, five times; the median counts. The trials are made up:
25 learning rates × 4 seeds × 10 weight decays × 10 init stds along a valley with noise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mue.lab.data.spec import open_corpus
from mue.lab.sweep.sampler import sampler_of
from mue.lab.sweep.spec import sweep_from
from mue.lab.sweep.state import SweepState
from mue.lab.sweep.storage import Execute
from mue.lab.sweep.trials import Trials
from mue.plan.toml import read_toml
from mue.util.files import write_json

FILE = """
[base]
width = 64
ffn = 64
layers = 3
head_dim = 32
[base.training]
batch = 1024
steps = 150
[data]
source = "text.txt"
[sweep]
lr = {lr}
weight_decay = {wd}
init_std = {std}
seeds = [0, 1, 2, 3]
"""
REPEATS = 5
WHAT = {
    "start": "a worker in its own folder: every trial read, nothing left to do, valleys fitted, result.json written",
    "join": "the same in an empty folder, as on a machine that comes new to the storage",
    "listing": "mue report FOLDER --list",
    "report": "mue report FOLDER: trials read, valleys fitted, trials.csv, picture and page written",
    "resume": "mue sweep --resume FOLDER: start and report in one",
}


def made_up(folder: Path, trials: int, storage: str | None) -> Path:
    """A sweep's file, with every trial in ``storage`` (None: a file in ``folder/out``) as if a worker had ended it."""
    side = max(2, round(math.sqrt(trials / 100)))
    axes = {
        "lr": [round(2.0 ** (-13 + 0.4 * i), 9) for i in range(25)],
        "wd": [round(0.01 * 1.6**i, 6) for i in range(side)],
        "std": [round(0.005 * 1.6**i, 6) for i in range(side)],
    }
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20_000)
    file = folder / "sweep.toml"
    file.write_text(FILE.format(**axes))
    spec = sweep_from(read_toml(file), folder)
    found = SweepState(folder / "out", spec, spec.identity(open_corpus(spec.source).hash), storage).open_trials()
    found.add(sampler_of(spec.grid).points()[:trials])
    end_all(found)
    return file


def end_all(trials: Trials) -> None:
    """End every trial at once: what claims and ends of thousands of workers would have left."""
    dice = random.Random(0)
    rows, losses = [], []
    for trial in trials.all():
        x = math.log2(trial.point["lr"]) + 8 + 0.3 * math.log2(trial.point["weight_decay"])
        loss = 2.3 + 0.02 * x * x + 0.05 * math.log2(trial.point["init_std"] / 0.05) ** 2 + dice.gauss(0, 0.01)
        result = {
            "key": f"{dice.getrandbits(64):016x}", "plan": f"{dice.getrandbits(64):016x}", "rule": "complete-mue",
            "name": "dense d64 L3", "status": "finished", "loss": loss, "val_loss": loss, "step": 150, "tokens": 153600,
            "seconds": 12.3, "parameters": 123456, "active_parameters": 123456, "flops_per_token": 740736.0,
            "data": "0" * 64, "seed": trial.seed, "git": "0123456789ab", "mue": "0.1.0", "torch": "2.13.0",
            "python": "3.11", "machine": "x86_64, 2 cores, AVX512", "threads": 1,
        }  # fmt: skip
        rows += [{"trial": trial.id, "key": "result", "value": json.dumps(result)}]
        rows += [{"trial": trial.id, "key": "owner", "value": json.dumps(f"machine{trial.id % 8}:1:0")}]
        losses.append({"trial": trial.id, "loss": loss})

    def work(execute: Execute) -> None:
        execute("INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (:trial, :key, :value)", rows)
        execute(
            "INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (:trial, 0, :loss, 'FINITE')",
            losses,
        )
        execute("UPDATE trials SET state = 'COMPLETE' WHERE study_id = :study", study=trials.study)

    trials.database.run(work)


WORKER = """
import sys
from pathlib import Path
from mue.plan.toml import read_toml
from mue.lab.data.spec import open_corpus
from mue.lab.sweep.spec import sweep_from
from mue.lab.sweep.sweep import run_sweep
file, out, storage = sys.argv[1:]
spec = sweep_from(read_toml(Path(file)), Path(file).parent)
swept = run_sweep(spec, Path(out), open_corpus(spec.source), storage=storage or None)
assert "torch" not in sys.modules
"""


def timed(command: list[str], before: Any = None) -> float:
    """Median seconds of a process from its start to its end."""
    seconds = []
    for _ in range(REPEATS):
        if before:
            before()
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds), 3)


def measure(trials: int, storage: str | None) -> dict[str, float]:
    """Seconds of each command on ``trials`` ended trials."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = made_up(folder, trials, storage)
        out, other = str(folder / "out"), str(folder / "other")
        mue = [sys.executable, "-c", "from mue.cli import main; main()"]
        worker = [sys.executable, "-c", WORKER, str(file)]
        where = ["--storage", storage] if storage else []
        subprocess.run([*mue, "sweep", str(file), "-o", out, *where], check=True, capture_output=True)
        found = {
            "start": timed([*worker, out, storage or ""]),
            "listing": timed([*mue, "report", out, "--list"]),
            "report": timed([*mue, "report", out]),
            "resume": timed([*mue, "sweep", "--resume", out, *where]),
        }
        if storage:
            found["join"] = timed([*worker, other, storage], lambda: shutil.rmtree(other, ignore_errors=True))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument(
        "--postgresql", help="a database to use, as postgresql://USER:PASSWORD@HOST/NAME; its study stays there"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [{"storage": "sqlite", **measure(options.trials, None)}]
    if options.postgresql:
        os.environ["PGPASSWORD"] = urlsplit(options.postgresql).password or ""
        rows.append({"storage": "postgresql", **measure(options.trials, options.postgresql)})
    for row in rows:
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    if options.json:
        from mue.lab.train.provenance import provenance

        priority = "usual" if os.sched_getscheduler(0) == os.SCHED_OTHER else "real time"
        command = f"python benchmarks/trials.py --trials {options.trials}" + " --postgresql URL" * bool(
            options.postgresql
        )
        about = {"command": command, "priority": priority, **provenance()}
        write_json(options.json, {**about, "trials": options.trials, "what": WHAT, "seconds, median of 5": rows})


if __name__ == "__main__":
    main()
