"""Runs in flight: hand them in, hear of them, give them up. Where and how they are trained is the runner's affair.

    runner = open_runner("processes", store)
    runner.submit(run)                               # as many as runner.slots at once keep the machine busy
    for message in runner.wait(timeout=1.0): ...     # Progress, Done, or Busy

Whatever the kind, a run leaves the same files in the store (``mue.lab.run``), and a run that was given up or whose
process died goes on from its checkpoint when it is submitted again.
"""

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
from typing import Any, Protocol

from mue.lab.run import Run, Store

KINDS = ("auto", "processes", "stacked")


@dataclass(frozen=True)
class Progress:
    """A run has reached ``step``; ``loss`` is that step's training loss in nats."""

    key: str
    step: int
    loss: float


@dataclass(frozen=True)
class Done:
    """A run has ended. ``result["status"]`` is "finished" or "diverged" (stored as the run's result), or "stopped"
    (by :meth:`Runner.stop`: not stored, ``val_loss`` None, the checkpoint stays)."""

    run: Run
    result: dict[str, Any]


@dataclass(frozen=True)
class Busy:
    """Another process trains this run at the moment: it was not begun here. Submit it again later."""

    run: Run


Message = Progress | Done | Busy


class FailedError(RuntimeError):
    """A run ended in an error that is ours, not the user's."""


class Runner(Protocol):
    """What trains runs."""

    slots: int
    """How many runs it wants in flight at once. More may be submitted; they wait their turn."""

    def submit(self, run: Run) -> None:
        """Train ``run``; a finished one comes back at once with its stored result. One key is in flight only once."""

    def wait(self, timeout: float | None = None) -> list[Message]:
        """What has happened, oldest first: blocks until there is something, or ``timeout`` seconds; [] on timeout
        and where nothing is in flight.

        Raises:
            ValueError, OSError: what a run said of its input or of the disk; that run is no longer in flight.
            FailedError: an error of ours, with its text.
        """

    def stop(self, key: str) -> None:
        """Give a run up: it ends as :class:`Done` with status "stopped". Nothing happens to one that has ended."""

    def close(self) -> None:
        """End what is in flight at once; checkpoints stay."""


def open_runner(
    kind: str, store: Store, *, workers: int | None = None, checkpoint_seconds: float = 10.0, example: Run | None = None
) -> Runner:
    """A runner of a kind.

    Args:
        kind: "processes", "stacked", or "auto": what a short calibration on ``example`` finds fastest.
        workers: processes ("processes") or runs at once ("stacked"); default: what suits the machine.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"[sweep] runner must be one of {', '.join(KINDS)}, got {kind!r}")
    count = workers or os.cpu_count() or 1
    return Processes(count, max(1, (os.cpu_count() or 1) // count), store, checkpoint_seconds)


class Processes:
    """Worker processes with one run each.

    Measured on 2 cores with d64–d128 proxies: two single-thread processes give 1.3–1.7× the throughput of one with two.
    """

    def __init__(self, count: int, threads: int, store: Store, checkpoint_seconds: float) -> None:
        self.slots, self.store, self.threads, self.checkpoint_seconds = count, store, threads, checkpoint_seconds
        self.inbox: SimpleQueue[tuple[int, dict[str, Any] | None]] = SimpleQueue()
        self.waiting: deque[Run] = deque()
        self.busy: dict[int, Run] = {}
        self.events: deque[Message | Exception] = deque()
        self.workers: list[subprocess.Popen[str]] = []

    def submit(self, run: Run) -> None:
        known = self.store.result(run.key)
        if known is not None:
            self.events.append(Done(run, known))
            return
        self.waiting.append(run)
        self._feed()

    def wait(self, timeout: float | None = None) -> list[Message]:
        while self.busy:
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
        for run in [run for run in self.waiting if run.key == key]:
            self.waiting.remove(run)
            self.events.append(Done(run, {"key": key, "status": "stopped", "step": 0, "loss": None, "val_loss": None}))
        for index, run in self.busy.items():
            if run.key == key:
                self._say(index, {"stop": key})

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.wait()

    def _hear(self, index: int, said: dict[str, Any] | None) -> None:
        """Turn what a worker said (None: it has ended) into an event."""
        run = self.busy.get(index)
        if run is None:
            return  # it ended after its last run
        if said is not None and "step" in said:
            self.events.append(Progress(run.key, said["step"], said["loss"]))
            return
        del self.busy[index]
        if said is None:
            code = self.workers[index].wait()
            self.workers[index] = self._start(index)
            self.events.append(
                FailedError(f"the worker training run {run.key} ended (exit code {code}); run it again to go on")
            )
        elif "result" in said:
            self.events.append(Done(run, said["result"]))
        elif said["kind"] == "busy":
            self.events.append(Busy(run))
        elif said["kind"] == "user":
            self.events.append((OSError if said["type"] == "OSError" else ValueError)(said["error"]))
        else:
            self.events.append(FailedError(f"{said['type']}: {said['error']}"))
        self._feed()

    def _feed(self) -> None:
        """Hand waiting runs to idle workers; a worker is started when it is first needed."""
        while self.waiting and len(self.busy) < self.slots:
            index = next(i for i in range(self.slots) if i not in self.busy)
            if index == len(self.workers):
                self.workers.append(self._start(index))
            run = self.waiting.popleft()
            self.busy[index] = run
            job = {
                "id": run.key,
                "run": run.to_dict(),
                "store": str(Path(self.store.root).absolute()),
                "threads": self.threads,
                "checkpoint_seconds": self.checkpoint_seconds,
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
            "OMP_NUM_THREADS": str(self.threads),
            # glibc hands tensors of this size back to the kernel after each use, and page faults cost a third of a step.
            "MALLOC_MMAP_THRESHOLD_": "1073741824",
            "MALLOC_TRIM_THRESHOLD_": "2147483647",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "mue.lab.worker"],
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
            self.inbox.put((index, json.loads(line)))
        self.inbox.put((index, None))
