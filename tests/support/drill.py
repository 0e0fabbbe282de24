"""A fault drill for sweeps: workers on one storage, killed, frozen and cut off at random; what is counted must not change.

Workers are processes of their own. ``trained="really"`` trains; ``"quickly"`` puts a stand-in in the place of the runner whose
loss is a function of the point: the rest of the worker is the real one, and a drill takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mue.lab.sweep.state import SweepState
from mue.lab.sweep.trial import Trial
from support.dice import dice

WORKER = '''
import hashlib, os, sys, time
from pathlib import Path
from mue.plan.toml import read_toml
from mue.lab.sweep import sweep
from mue.lab.data.spec import open_corpus
from mue.lab.sweep.spec import sweep_from
from mue.lab.runners.runner import Done, Progress
from mue.lab.sweep.listener import SweepListener

file, out, storage, lease, trained, log, core = sys.argv[1:]
os.sched_setaffinity(0, {int(core)})  # one core: one thread of training, so the same bits on every start


class Log(SweepListener):
    working = False

    def ended(self, run, result, *, fresh):
        self.line(f"ended {run.key}")

    def moved(self, run, step, loss):
        if not self.working:
            self.working = True
            self.line(f"working {os.getpid()}")

    def say(self, text):
        self.line(f"said {text}")

    def line(self, words):
        with open(log, "a") as lines:
            lines.write(words + "\\n")


class Quick:
    """Ten steps of a fraction of a second, and a loss that is a function of the point."""

    slots, why = 2, "a stand-in"

    def __init__(self):
        self.flying = {}

    def submit(self, run, *, keep_weights=False):
        self.flying[run.key] = (run, 0)

    def wait(self, timeout=None):
        time.sleep(0.04)
        said = []
        for key, (run, step) in list(self.flying.items()):
            self.flying[key] = (run, step + 1)
            said.append(Progress(key, step + 1, 1.0))
            if step == 9:
                del self.flying[key]
                noise = int(hashlib.sha256(key.encode()).hexdigest()[:6], 16) / 2**24
                loss = 2 + abs(run.plan.tuned.lr - 0.008) * 10 + 0.01 * noise
                said.append(Done(run, {"key": key, "status": "finished", "val_loss": loss, "loss": loss, "step": 10, "seconds": 0.4}))
        return said

    def stop(self, key):
        self.flying.pop(key, None)

    def close(self):
        pass


if trained == "quickly":
    sweep.open_runner = lambda *_, **__: Quick()
spec = sweep_from(read_toml(Path(file)), Path(file).parent)
corpus = open_corpus(spec.source)
print("ready", flush=True)
sweep.run_sweep(
    spec, Path(out), corpus, storage=storage or None, lease=float(lease), workers=1, listener=Log(), checkpoint_seconds=0.3
)
'''


@dataclass
class Drill:
    """Workers of the sweep in ``file``, two in each folder; a folder stands for a machine."""

    file: Path
    folders: list[Path]
    storage: str
    trained: str
    lease: float = 2.0
    rolled: random.Random = field(default_factory=lambda: dice("a drill"))
    workers: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    did: Counter[str] = field(default_factory=Counter)
    done: int = 0
    """Trials that had ended at the last kill."""

    @property
    def log(self) -> Path:
        return self.file.with_name("log.txt")

    def lines(self, word: str) -> list[str]:
        """What the workers reported under a word: trials that ended, processes that were training, what they said."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} ")]

    def start(self, index: int) -> None:
        """Worker ``index``, new or again."""
        core = sorted(os.sched_getaffinity(0))[index % len(os.sched_getaffinity(0))]
        command = [sys.executable, "-c", WORKER, self.file, self.folders[index // 2 % len(self.folders)], self.storage]
        command += [self.lease, self.trained, self.log, core]
        errors = self.file.with_name(f"worker-{index}.err").open("w")
        self.workers[index] = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=errors, text=True
        )

    def run(
        self,
        kills: int,
        wait: tuple[float, float],
        *,
        freezes: int = 0,
        cut: Callable[[], None] | None = None,
        trials: int = 0,
    ) -> None:
        """Four workers; ``kills`` kills, ``freezes`` of them followed by a freeze beyond the lease; ``cut`` half way.

        ``wait``: seconds until the next kill from when a worker has begun to train, or has ended a trial, after the last: on
        a busy machine too the kills hit workers at work and not only workers that start. ``trials``, where given, are not
        to be over before the kills are: on a fast machine these come sooner.
        """
        for index in range(4):
            self.start(index)
        for kill in range(kills):
            before, deadline = self._reached(), time.monotonic() + 60
            while self._reached() == before and time.monotonic() < deadline:
                time.sleep(0.02)
            due = time.monotonic() + self.rolled.uniform(*wait)
            while time.monotonic() < due and (not trials or len(self.lines("ended")) <= 0.9 * trials * kill / kills):
                time.sleep(0.02)
            living = [i for i, worker in self.workers.items() if worker.poll() is None]
            if not living:
                break
            victim = self.rolled.choice(living)
            self.workers[victim].kill()
            self.workers[victim].wait()
            self.did["kills"] += 1
            self.did["kills_of_workers_in_training"] += str(self.workers[victim].pid) in self.lines("working")
            self.start(victim)
            if kill * freezes // kills != (kill + 1) * freezes // kills:
                self._freeze(self.rolled.choice([i for i in living if i != victim] or [victim]))
            if cut and kill == kills // 2:
                threading.Thread(target=cut).start()
                self.did["cuts"] += 1
        self.done = len(self.lines("ended"))

    def _reached(self) -> int:
        return len(self.lines("ended")) + len(self.lines("working"))

    def _freeze(self, index: int) -> None:
        """A worker that is only slow: it wakes after others have taken its trials, two and a half leases later."""
        worker = self.workers[index]
        if worker.poll() is not None:
            return
        worker.send_signal(signal.SIGSTOP)
        self.did["freezes"] += 1
        threading.Timer(2.5 * self.lease, worker.send_signal, (signal.SIGCONT,)).start()

    def finish(self, timeout: float) -> list[Trial]:
        """Wait for the workers' own end; every trial as the storage has it then."""
        deadline = time.monotonic() + timeout
        for index, worker in self.workers.items():
            code = worker.wait(max(1.0, deadline - time.monotonic()))
            assert code == 0, self.file.with_name(f"worker-{index}.err").read_text()[-3000:]
        return self.trials()

    def trials(self) -> list[Trial]:
        return SweepState.load(self.folders[0]).read_trials().all()

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.kill()
            worker.wait()

    def faults(self, trials: list[Trial], count: int) -> list[str]:
        """What a drill must not do: lose a trial, have one twice, count one twice."""
        out = [f"trial {t.number} is {t.state}" for t in trials if t.state != "COMPLETE"]
        if len(trials) != count or len({tuple(t.point.items()) for t in trials}) != count:
            out.append(f"{len(trials)} trials instead of {count}")
        told = Counter(self.lines("ended"))
        out += [f"run {key} was counted {n} times" for key, n in told.items() if n > 1]
        if sum(told.values()) < count - self.did["kills"]:
            out.append("ended trials that nobody reported")  # a kill may fall between the storage's word and the log's
        return out

    def results(self) -> list[dict[str, Any]]:
        return [json.loads((folder / "result.json").read_text()) for folder in self.folders]
