"""The runner: worker processes (``mue.lab.runners.worker``), each with one run or with a stack of them.

One process submits, the others train; what they send as lines of JSON is read by a thread for each and put into one inbox, so that
:meth:`Pool.wait` waits at a single place. A worker that dies costs its runs nothing but the time since their checkpoints.
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
from typing import Any

from mue.lab.runners.runner import Busy, Done, FailedError, Message, Progress
from mue.lab.train.run import Run, Store

# A run whose process dies this often without the run getting any further is given up: once or twice may be the
# machine's fault (out of memory beside other work), and each time it goes on from its checkpoint.
DEATHS = 3


@dataclass(frozen=True)
class WorkerLayout:
    """How runs are laid out on a machine: ``processes`` × ``stack`` at once.

    Attributes:
        processes: worker processes. threads: of each. stack: runs that each computes as one program (1: one after the other).
        compiled: their blocks are compiled. devices: the GPUs, as CUDA_VISIBLE_DEVICES names them, that the processes take in turn;
            none: what torch sees.
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
class _RunInFlight:
    """A run under way: in which worker, how far it is, and how often in a row its worker died at that point."""

    run: Run
    keep_weights: bool = False
    worker: int = -1
    step: int = 0
    died_at: int = -1
    deaths: int = 0
    stopped: bool = False


class Pool:
    """A :class:`mue.lab.runners.runner.Runner`; workers are started when they are first needed.

    Args:
        layout: how many processes, and what each does. store: where runs are kept. checkpoint_seconds: time between checkpoints.
        why: the sentence that says why this layout.

    Attributes:
        waiting: submitted and not yet with a worker. in_flight: with a worker, by key. events: what :meth:`wait` will
            say next.
    """

    def __init__(self, layout: WorkerLayout, store: Store, checkpoint_seconds: float = 10.0, why: str = "") -> None:
        self.layout, self.store, self.checkpoint_seconds, self.why = layout, store, checkpoint_seconds, why
        self.inbox: SimpleQueue[tuple[int, dict[str, Any] | None]] = SimpleQueue()
        self.waiting: deque[_RunInFlight] = deque()
        self.in_flight: dict[str, _RunInFlight] = {}
        self.events: deque[Message | Exception] = deque()
        self.workers: list[subprocess.Popen[str]] = []

    @property
    def slots(self) -> int:
        return self.layout.processes * self.layout.stack

    def submit(self, run: Run, *, keep_weights: bool = False) -> None:
        known = self.store.result(run.key)
        if known is not None:
            self.events.append(Done(run, known))
            return
        assert run.key not in self.in_flight
        self.waiting.append(_RunInFlight(run, keep_weights))
        self.dispatch()

    def wait(self, timeout: float | None = None) -> list[Message]:
        while self.in_flight:  # block only while there is nothing to say, then take what has piled up
            try:
                self.on_message(*self.inbox.get(not self.events, timeout))
            except Empty:
                break
        # What happened before an error is told first; the error is raised by the next call, when it is the oldest.
        messages: list[Message] = []
        while self.events and not isinstance(self.events[0], Exception):
            messages.append(self.events.popleft())  # type: ignore[arg-type]
        if not messages and self.events:
            raise self.events.popleft()  # type: ignore[misc]
        return messages

    def stop(self, key: str) -> None:
        for flight in [flight for flight in self.waiting if flight.run.key == key]:
            self.waiting.remove(flight)
            self.events.append(_stopped_result(flight))
        if key in self.in_flight:
            self.in_flight[key].stopped = True
            self.send(self.in_flight[key].worker, {"stop": key})

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()  # at any moment: a checkpoint on disk is whole (mue.util.files)
        for worker in self.workers:
            worker.wait()

    def on_message(self, index: int, message: dict[str, Any] | None) -> None:
        """Turn a worker's message (None: its process has ended) into events."""
        if message is None:
            self.on_exit(index)
        elif message["id"] not in self.in_flight:
            return  # it was given up as failed
        elif "step" in message:
            self.in_flight[message["id"]].step = message["step"]
            self.events.append(Progress(message["id"], message["step"], message["loss"]))
        else:
            run = self.in_flight.pop(message["id"]).run
            self.events.append(_last_message(run, message))
        self.dispatch()

    def on_exit(self, index: int) -> None:
        """A worker has died: a new one goes on with its runs from their checkpoints."""
        code = self.workers[index].wait()
        lost = [flight for flight in self.in_flight.values() if flight.worker == index]
        self.workers[index] = self._start(index)
        for flight in lost:
            del self.in_flight[flight.run.key]
            # It goes on from a checkpoint, so the step that it died at is passed again before there is progress.
            flight.deaths = flight.deaths + 1 if flight.step <= flight.died_at else 1
            flight.died_at = max(flight.step, flight.died_at)
            if flight.stopped:
                self.events.append(_stopped_result(flight))
            elif flight.deaths < DEATHS:
                self.waiting.appendleft(flight)
            else:
                text = f"the process training run {flight.run.key} died {DEATHS} times at step {flight.died_at} (exit code {code})"
                self.events.append(FailedError(f"{text}; run it again to go on from its checkpoint"))

    def dispatch(self) -> None:
        """Hand waiting runs to the workers with the fewest."""
        while self.waiting and len(self.in_flight) < self.slots:
            load = [0] * self.layout.processes
            for flight in self.in_flight.values():
                load[flight.worker] += 1
            index = load.index(min(load))
            if index == len(self.workers):
                self.workers.append(self._start(index))
            flight = self.waiting.popleft()
            flight.worker = index
            self.in_flight[flight.run.key] = flight
            job = {
                "id": flight.run.key,
                "run": flight.run.to_dict(),
                "store": str(Path(self.store.root).absolute()),
                "checkpoint_seconds": self.checkpoint_seconds,
                "threads": self.layout.threads,
                "stack": self.layout.stack,
                "compiled": self.layout.compiled,
                "keep_weights": flight.keep_weights,
            }
            self.send(index, job)

    def send(self, index: int, line: dict[str, Any]) -> None:
        """Send a line to a worker's stdin: a job, or the key of a run to give up."""
        pipe = self.workers[index].stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(line) + "\n")
            pipe.flush()
        except BrokenPipeError:
            pass  # it has died: wait() hears of that

    def _start(self, index: int) -> subprocess.Popen[str]:
        """Start the worker of a place, with the thread that listens to it."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.layout.threads),
        }
        if self.layout.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.layout.devices[index % len(self.layout.devices)]
        process = subprocess.Popen(
            [sys.executable, "-m", "mue.lab.runners.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        # A thread for each: a pipe has to be read all the time, or its worker stands still once it is full.
        threading.Thread(target=self._listen, args=(index, process), daemon=True).start()
        return process

    def _listen(self, index: int, process: subprocess.Popen[str]) -> None:
        """Put a worker's messages into the inbox, and None once it has ended."""
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):  # else it was killed in the middle of a word
                self.inbox.put((index, json.loads(line)))
        self.inbox.put((index, None))


def _stopped_result(flight: _RunInFlight) -> Done:
    """A run that was given up while no process could say so."""
    nothing = {"loss": None, "val_loss": None}
    return Done(flight.run, {"key": flight.run.key, "status": "stopped", "step": flight.step, **nothing})


def _last_message(run: Run, message: dict[str, Any]) -> Message | Exception:
    """What becomes of a worker's last message on a run."""
    if "result" in message:
        return Done(run, message["result"])
    if message["kind"] == "busy":
        return Busy(run)
    if message["kind"] == "user":
        return (OSError if message["type"] == "OSError" else ValueError)(message["error"])
    return FailedError(f"{message['type']}: {message['error']}")
