"""The runner: worker processes (``mue.lab.runners.worker``), each with one run or with a stack of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from mue.lab.runners.runner import Busy, Done, FailedError, Message, Progress
from mue.lab.train.run import Run, Store

# A run whose process dies this often without the run getting any further is given up.
DEATHS = 3


@dataclass(frozen=True)
class Mode:
    """How runs are laid out: ``processes`` × ``stack`` at once, each process with ``threads`` threads.

    ``devices`` are the GPUs (as CUDA_VISIBLE_DEVICES has them) that the processes take in turn; none: whatever torch sees.
    """

    processes: int
    threads: int
    stack: int = 1
    compiled: bool = False
    devices: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.processes} process{'es' if self.processes > 1 else ''}"]
        parts += (
            [f"on {len(self.devices)} GPU"]
            if self.devices
            else [f"of {self.threads} threads"[: -1 if self.threads == 1 else None]]
        )
        parts += [f"with stacks of {self.stack}"] if self.stack > 1 else []
        return " ".join(parts) + (", compiled" if self.compiled else "")


@dataclass
class _Flight:
    """A run under way: in which worker, how far it is, and how often in a row its worker died at that point."""

    run: Run
    worker: int = -1
    step: int = 0
    died_at: int = -1
    deaths: int = 0
    stopped: bool = False


class Pool:
    """A :class:`mue.lab.runners.runner.Runner`; workers are started when they are first needed."""

    def __init__(self, mode: Mode, store: Store, checkpoint_seconds: float = 10.0, why: str = "") -> None:
        self.mode, self.store, self.checkpoint_seconds, self.why = mode, store, checkpoint_seconds, why
        self.inbox: SimpleQueue[tuple[int, dict[str, Any] | None]] = SimpleQueue()
        self.waiting: deque[_Flight] = deque()
        self.flying: dict[str, _Flight] = {}
        self.events: deque[Message | Exception] = deque()
        self.workers: list[subprocess.Popen[str]] = []

    @property
    def slots(self) -> int:
        return self.mode.processes * self.mode.stack

    def submit(self, run: Run) -> None:
        known = self.store.result(run.key)
        if known is not None:
            self.events.append(Done(run, known))
            return
        assert run.key not in self.flying
        self.waiting.append(_Flight(run))
        self._feed()

    def wait(self, timeout: float | None = None) -> list[Message]:
        while self.flying:
            try:
                self._hear(*self.inbox.get(not self.events, timeout))
            except Empty:
                break
        messages: list[Message] = []
        while self.events and not isinstance(self.events[0], Exception):
            messages.append(self.events.popleft())  # type: ignore[arg-type]
        if not messages and self.events:
            raise self.events.popleft()  # type: ignore[misc]
        return messages

    def stop(self, key: str) -> None:
        for flight in [flight for flight in self.waiting if flight.run.key == key]:
            self.waiting.remove(flight)
            self.events.append(_stopped(flight))
        if key in self.flying:
            self.flying[key].stopped = True
            self._say(self.flying[key].worker, {"stop": key})

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.wait()

    def _hear(self, index: int, said: dict[str, Any] | None) -> None:
        """Turn what a worker said (None: it has ended) into events."""
        if said is None:
            self._bury(index)
        elif said["id"] not in self.flying:
            return  # it was given up as failed
        elif "step" in said:
            self.flying[said["id"]].step = said["step"]
            self.events.append(Progress(said["id"], said["step"], said["loss"]))
        else:
            run = self.flying.pop(said["id"]).run
            self.events.append(_ending(run, said))
        self._feed()

    def _bury(self, index: int) -> None:
        """A worker has died: a new one goes on with its runs from their checkpoints."""
        code = self.workers[index].wait()
        lost = [flight for flight in self.flying.values() if flight.worker == index]
        self.workers[index] = self._start(index)
        for flight in lost:
            del self.flying[flight.run.key]
            flight.deaths = flight.deaths + 1 if flight.step <= flight.died_at else 1
            flight.died_at = max(flight.step, flight.died_at)
            if flight.stopped:
                self.events.append(_stopped(flight))
            elif flight.deaths < DEATHS:
                self.waiting.appendleft(flight)
            else:
                text = f"the process training run {flight.run.key} died {DEATHS} times at step {flight.died_at} (exit code {code})"
                self.events.append(FailedError(f"{text}; run it again to go on from its checkpoint"))

    def _feed(self) -> None:
        """Hand waiting runs to the workers with the fewest."""
        while self.waiting and len(self.flying) < self.slots:
            load = [0] * self.mode.processes
            for flight in self.flying.values():
                load[flight.worker] += 1
            index = load.index(min(load))
            if index == len(self.workers):
                self.workers.append(self._start(index))
            flight = self.waiting.popleft()
            flight.worker = index
            self.flying[flight.run.key] = flight
            job = {
                "id": flight.run.key,
                "run": flight.run.to_dict(),
                "store": str(Path(self.store.root).absolute()),
                "checkpoint_seconds": self.checkpoint_seconds,
                "threads": self.mode.threads,
                "stack": self.mode.stack,
                "compiled": self.mode.compiled,
            }
            self._say(index, job)

    def _say(self, index: int, line: dict[str, Any]) -> None:
        pipe = self.workers[index].stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(line) + "\n")
            pipe.flush()
        except BrokenPipeError:
            pass  # it has died: wait() hears of that

    def _start(self, index: int) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.mode.threads),
            # glibc hands tensors of this size back to the kernel after each use, and page faults cost a third of a step.
            "MALLOC_MMAP_THRESHOLD_": "1073741824",
            "MALLOC_TRIM_THRESHOLD_": "2147483647",
        }
        if self.mode.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.mode.devices[index % len(self.mode.devices)]
        process = subprocess.Popen(
            [sys.executable, "-m", "mue.lab.runners.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        threading.Thread(target=self._listen, args=(index, process), daemon=True).start()
        return process

    def _listen(self, index: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):  # else it was killed in the middle of a word
                self.inbox.put((index, json.loads(line)))
        self.inbox.put((index, None))


def _stopped(flight: _Flight) -> Done:
    """A run that was given up while no process could say so."""
    nothing = {"loss": None, "val_loss": None}
    return Done(flight.run, {"key": flight.run.key, "status": "stopped", "step": flight.step, **nothing})


def _ending(run: Run, said: dict[str, Any]) -> Message | Exception:
    """A worker's last word on a run."""
    if "result" in said:
        return Done(run, said["result"])
    if said["kind"] == "busy":
        return Busy(run)
    if said["kind"] == "user":
        return (OSError if said["type"] == "OSError" else ValueError)(said["error"])
    return FailedError(f"{said['type']}: {said['error']}")
