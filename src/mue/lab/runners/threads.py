"""How many threads the one run of this process is trained with: measured on the run itself, as a sweep measures its layouts.

Small models gain nothing from a second thread, and on a machine where others are at work the threads of one product wait for each other:
2,500 steps of a d96 model took 4:27 with two threads and 31 s with one (two cores, load 5).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import torch

from mue.lab.data import Data
from mue.lab.runners.calibrate import FLAT, MEASURED_SECONDS, MEASURED_STEPS, cores, endless
from mue.lab.train.run import CHECKPOINT_FILE, Run, Store
from mue.lab.train.session import TrainingSession
from mue.util.safetensors import read_header

_SHORT = 50  # steps; of fewer the measurement would be a good part


def set_threads(run: Run, store: Store, corpus: Data) -> str:
    """Set torch's threads to what trains ``run`` fastest on this machine as busy as it is now.

    A run that was interrupted keeps the number it began with, for the last bits depend on it; so does ``OMP_NUM_THREADS``, which is
    somebody's choice.

    Returns:
        A sentence that says how many there are and why.
    """
    own, training = torch.get_num_threads(), run.plan.training
    assert training is not None
    if os.environ.get("OMP_NUM_THREADS"):
        return f"threads: {own}, as OMP_NUM_THREADS says"
    if (before := _of_checkpoint(store.folder(run.key) / CHECKPOINT_FILE)) is not None:
        torch.set_num_threads(before)
        return f"threads: {before}, as before the interruption"
    if cores() == 1 or training.steps < _SHORT:
        return f"threads: {own}" + (" (so short a run is not measured)" if cores() > 1 else "")
    started = time.monotonic()
    rates = _measure(run, corpus)
    best = max(rates, key=lambda n: rates[n])
    torch.set_num_threads(best)
    others = ", ".join(f"{n}: {rate:.3g}" for n, rate in rates.items() if n != best)
    return f"threads: {best}, {rates[best]:.3g} steps/s ({others}; measured in {time.monotonic() - started:.0f} s)"


def _of_checkpoint(path: Path) -> int | None:
    """The threads of the sitting that wrote a checkpoint; None where there is none, or one of before they were noted."""
    if not path.exists():
        return None
    threads = json.loads(read_header(path).metadata.get("mue", "{}")).get("threads")
    return int(threads) if threads else None


def _measure(run: Run, corpus: Data) -> dict[int, float]:
    """Steps per second by number of threads: all cores, then half as many each time while that is not clearly slower."""
    rates: dict[int, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="mue-threads-") as folder,
        TrainingSession(endless(run, run.settings.seed), Path(folder), corpus, torch.device("cpu")) as session,
    ):
        threads = cores()
        while threads and (len(rates) < 2 or FLAT * list(rates.values())[-1] >= max(rates.values())):
            torch.set_num_threads(threads)
            rates[threads] = _rate(session)
            threads //= 2
    return rates


def _rate(session: TrainingSession) -> float:
    session.train_step()  # the threads start, and the caches fill
    started, steps = time.monotonic(), 0
    while steps < MEASURED_STEPS or time.monotonic() - started < MEASURED_SECONDS:
        session.train_step()
        steps += 1
    return steps / (time.monotonic() - started)
