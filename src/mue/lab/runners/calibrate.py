"""Which layout of runs is fastest here: measured in ten to twenty seconds on the runs themselves, then remembered.

Candidates on a CPU: one run after the other with all cores, one run on each core, a stack of runs on all cores. On GPUs: one run on each, and
stacks that double until they gain less than a tenth or no longer fit. What wins is also tried compiled, where the work at hand is so long that
compiling could pay.

The measurement is kept in ``~/.cache/mue/runner/`` (or ``$MUE_CACHE/runner/``) by shape, batch, precision, task, device, torch's version and
the native kernel's; remove a file to measure again.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mue.kernels import build
from mue.lab.runners.pool import Pool, WorkerLayout
from mue.lab.runners.runner import Done, FailedError, Progress
from mue.lab.train.run import Run, Store
from mue.lab.train.stacked_session import check_stackable
from mue.plan.replan import inputs_from_dict
from mue.plan.transfer import plan_of
from mue.util.files import FileLock, cache_folder, digest, write_json

STACK = 4  # runs in a CPU's stack: more gain nothing and fall out of the caches
WARM_STEPS = 3  # a compiled stack still compiles in its second step
# At least both. With two seconds a layout calibration took 29-64 s, now 12-17; layouts within a tenth of each other it
# cannot tell apart, and need not (docs/LOG.md, "A sweep's layouts once more").
MEASURED_SECONDS, MEASURED_STEPS = 1.0, 3
# Work shorter than this is not worth trying to compile for: the trial itself compiles, 15-31 s block by block
# (docs/LOG.md, "Runs stacked, in processes, compiled"), and where the kernel is built little is left to gain.
COMPILING_SECONDS = 300.0
FLAT = 1.1  # a stack twice as large that is not this much faster is not taken


@dataclass(frozen=True)
class Measured:
    """How fast a layout is.

    Attributes:
        rate: steps per second of all runs together. compiling: what compiling took, in seconds (0: not compiled).
    """

    layout: WorkerLayout
    rate: float
    compiling: float

    def seconds(self, steps: float) -> float:
        """How long so many steps take in all."""
        return self.compiling + steps / self.rate

    def to_dict(self) -> dict[str, Any]:
        """A row of the calibration's file."""
        return {"mode": asdict(self.layout), "rate": self.rate, "compiling": self.compiling}


def cores() -> int:
    """The number of CPU cores that this process may use: fewer than the machine has under taskset or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> tuple[str, ...]:
    """The visible GPUs as CUDA_VISIBLE_DEVICES names them (indices or UUIDs); nothing is started on them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",")[:count]) if named else tuple(map(str, range(count)))


def choose_layout(kind: str, workers: int | None, example: Run | None, runs: int) -> tuple[WorkerLayout, str]:
    """Choose how runs are laid out on this machine.

    Args:
        kind: as :func:`mue.lab.runners.open.open_runner` takes it. workers: as asked for; None: what is fastest.
        example: what is measured. runs: how many like it are to come, by which it is decided whether compiling pays.

    Returns:
        The layout, and a sentence that says what it is and why.

    Raises:
        ValueError: something has to be measured and there is no example; the example's task cannot be stacked and ``kind`` is "stacked".
    """
    if kind == "stacked" and example is not None:
        check_stackable(example)
    devices = gpus()
    places, processes = max(1, len(devices)), workers or len(devices) or cores()
    if kind == "processes":
        layout = WorkerLayout(processes, max(1, cores() // processes), devices=devices)
        return layout, f"{layout}, as asked for"
    if kind == "stacked" and workers:
        layout = WorkerLayout(places, max(1, cores() // places), -(-workers // places), devices=devices)
        return layout, f"{layout}, as asked for"
    if example is None:
        raise ValueError(f'runner = "{kind}" has to be measured on a run: give an example, or use "processes"')
    assert example.plan.training is not None
    with Calibration(example, len(devices) or processes, devices) as calibration:
        return calibration.best(kind, runs, runs * example.plan.training.steps)


class Calibration:
    """What is known about runs like ``example`` on this machine; what is asked for and not known is measured. A context:
    while it is open no other process measures the same."""

    def __init__(self, example: Run, processes: int, devices: tuple[str, ...]) -> None:
        self.example, self.devices = example, devices
        self.together = WorkerLayout(max(1, len(devices)), max(1, cores() // max(1, len(devices))), devices=devices)
        self.apart = WorkerLayout(processes, max(1, cores() // processes), devices=devices)
        effective = example.effective
        self.about = {
            "model": [effective["shape"], effective["multipliers"], effective["training"]["batch"]],
            "settings": [example.settings.precision, example.settings.balance],
            **{key: effective["settings"][key] for key in ("task", "consistency") if key in effective["settings"]},
            "machine": [torch.cuda.get_device_name(i) for i in range(len(devices))]
            or f"{platform.machine()}, {cores()} cores",
            "processes": processes,
            "devices": devices,
            "torch": torch.__version__,
            # Its name has source, compiler and instruction set in it. A choice that was remembered over a change of the
            # kernel was the wrong one (docs/LOG.md, "A sweep's layouts once more").
            "kernel": None if devices or (kernel := build.find()) is None else kernel.stem,
        }
        self.path = cache_folder() / "runner" / f"{digest(self.about)}.json"
        self.known: dict[WorkerLayout, Measured] = {}
        self.failed: dict[WorkerLayout, str] = {}
        self.fresh = 0
        self.seeds = 0

    def __enter__(self) -> Calibration:
        self.opened = ExitStack()
        # Two that measure at once would each find half the machine.
        self.opened.enter_context(FileLock(self.path.with_suffix(".lock")))
        if self.path.exists():
            for row in json.loads(self.path.read_text(encoding="utf-8"))["measured"]:
                layout = WorkerLayout(**{**row.pop("mode"), "devices": self.devices})
                self.known[layout] = Measured(layout, **row)
        self.store = Store(Path(self.opened.enter_context(tempfile.TemporaryDirectory(prefix="mue-calibrate-"))))
        self.pool: Pool | None = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.close()
        self.opened.close()

    def best(self, kind: str, runs: int, steps: int) -> tuple[WorkerLayout, str]:
        """The fastest layout for the work at hand, measured where it is not known.

        Args:
            kind: "stacked" considers stacks only. runs: how many; a stack is not larger. steps: of all of them
                together.

        Returns:
            The layout, and a sentence that says how fast it is and how fast the others are.

        Raises:
            ValueError: the run cannot be trained in any of them.
        """
        started = time.monotonic()
        # First the one with the most processes: they all start at once, and serve the others.
        found = (
            [] if kind == "stacked" else [m for layout in (self.apart, self.together) if (m := self.measured(layout))]
        )
        lacking = ""
        try:
            check_stackable(self.example)
        except ValueError as error:
            lacking = str(error)
        else:
            found += self._stacks(max(2, runs))
        if not found:
            raise ValueError(f"runner = {kind!r}: the run cannot be trained here: {'; '.join(self.failed.values())}")
        eager = min(found, key=lambda m: m.seconds(steps))
        if eager.seconds(steps) > COMPILING_SECONDS and (m := self.measured(replace(eager.layout, compiled=True))):
            found.append(m)
        best = min(found, key=lambda m: m.seconds(steps))
        others = [f"{m.layout} {m.rate:.3g}" for m in found if m is not best]
        others += [f"{layout} failed: {error}" for layout, error in self.failed.items()]
        others += [lacking.partition(":")[0]] if lacking else []
        others += [f"measured in {time.monotonic() - started:.0f} s" if self.fresh else "measured before"]
        return best.layout, f"{best.layout}: {best.rate:.3g} steps/s ({'; '.join(others)})"

    def measured(self, layout: WorkerLayout) -> Measured | None:
        """A layout's speed; None where it cannot run (out of memory, no compiler), which is tried again next time."""
        if layout not in self.known and layout not in self.failed:
            try:
                self.known[layout] = self._measure(layout)
            except FailedError as error:
                self.failed[layout] = str(error).strip().splitlines()[0]
                # Its other runs are endless and still in flight: they end with their processes.
                if self.pool:
                    self.pool.close()
                self.pool = None
            self.fresh += 1
            write_json(self.path, {**self.about, "measured": [known.to_dict() for known in self.known.values()]})
        return self.known.get(layout)

    def _stacks(self, runs: int) -> list[Measured]:
        """On a CPU one size; on GPUs doubling while it pays."""
        if not self.devices:
            one = self.measured(replace(self.together, stack=min(STACK, runs)))
            return [one] if one else []
        found: list[Measured] = []
        stack = 8  # where doubling begins; nothing of this has been measured on a GPU yet (docs/LOG.md)
        while stack < 2 * runs and (m := self.measured(replace(self.together, stack=min(stack, runs)))):
            found.append(m)
            if len(found) > 1 and m.rate < FLAT * found[-2].rate:
                break
            stack *= 2
        return found

    def _measure(self, layout: WorkerLayout) -> Measured:
        """Train endless runs in this layout until they are warm, then time them together.

        One pool serves all layouts: processes take seconds to start, and a job says how it is to be trained.
        """
        if self.pool is None:
            self.pool = Pool(layout, self.store, checkpoint_seconds=math.inf)  # the runs are thrown away
        self.pool.layout = layout
        started = time.monotonic()
        runs = [endless(self.example, self.seeds + i) for i in range(self.pool.slots)]
        self.seeds += len(runs)  # a run that was stopped is not taken up again
        for run in runs:
            self.pool.submit(run)
        seen = _reach(self.pool, {run.key: WARM_STEPS for run in runs}, 0.0)
        ready = time.monotonic()
        goal = {key: step + MEASURED_STEPS for key, step in seen.items()}
        after = _reach(self.pool, goal, MEASURED_SECONDS)
        seconds = time.monotonic() - ready
        for run in runs:
            self.pool.stop(run.key)
        ended = 0
        while ended < len(runs):
            ended += sum(isinstance(message, Done) for message in self.pool.wait())
        rate = sum(after[key] - seen[key] for key in seen) / seconds
        return Measured(layout, rate, ready - started if layout.compiled else 0.0)


def endless(example: Run, seed: int) -> Run:
    """``example`` with another seed and so many steps that it will not end, every step reported, no validation.

    Args:
        seed: different for each, since runs of one key are trained once.
    """
    inputs = example.plan.inputs.to_dict()
    # The base's duration with the target's: at T*/T as it was the plan's betas stay in their range.
    for part in ("training", "base_training"):
        if inputs.get(part):
            inputs[part] = {**inputs[part], "steps": 10**7}
    settings = replace(example.settings, seed=seed, log_every=1, eval_every=0, eval_sequences=1)
    return Run(plan_of(inputs_from_dict(inputs)), settings, example.data)


def _reach(pool: Pool, goal: dict[str, int], seconds: float) -> dict[str, int]:
    """Wait until every run has reached its step, and at least so long; where each is then."""
    until = time.monotonic() + seconds
    at = dict.fromkeys(goal, 0)
    while time.monotonic() < until or any(at[key] < step for key, step in goal.items()):
        for message in pool.wait(timeout=1.0):
            if isinstance(message, Progress):
                at[message.key] = message.step
    return at
