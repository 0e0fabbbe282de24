"""How others know that a worker lives: a thread renews its leases, and a locked file tells its neighbours on this machine."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mue.lab.sweep.trials import Trials
from mue.util.files import FileLock


class Heartbeat:
    """A thread that gives signs of life for the trials held, and hears which are lost.

    A thread, since the main one may be busy for long: it fits a search, starts processes, or waits for the storage.

    Args:
        trials: of the sweep. name: the worker's.

    Attributes:
        interval: seconds between two signs. error: what ended the thread, which the main one raises.
    """

    def __init__(self, trials: Trials, name: str) -> None:
        self.trials, self.name = trials, name
        self.interval = min(10.0, trials.lease / 4)  # so that a lease outlasts three signs that come late or not at all
        self.error: Exception | None = None
        self._lock, self._over = threading.Lock(), threading.Event()
        self._held: dict[int, dict[str, Any] | None] = {}
        self._lost: set[int] = set()

    def hold(self, trial: int) -> None:
        """From now on give signs of life for this trial."""
        with self._lock:
            self._held[trial] = None
            self._lost.discard(trial)

    def note(self, trial: int, progress: dict[str, Any]) -> None:
        """How far a trial is (step and loss): goes with the next sign of life, not in a transaction of its own."""
        with self._lock:
            if trial in self._held:
                self._held[trial] = progress

    def let_go(self, trial: int) -> None:
        """It has ended, or is somebody else's: no more signs of life."""
        with self._lock:
            self._held.pop(trial, None)

    def take_lost(self) -> set[int]:
        """The trials that another worker has by now; each is told of once."""
        with self._lock:
            lost, self._lost = self._lost, set()
            for trial in lost:
                self._held.pop(trial, None)
            return lost

    def __enter__(self) -> Heartbeat:
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def _beat(self) -> None:
        """The thread: a sign of life for all that is held, every ``interval`` seconds until the end."""
        while not self._over.wait(self.interval):
            with self._lock:
                held = dict(self._held)
            if not held:
                continue
            try:
                still = self.trials.renew(self.name, held)
            except Exception as error:  # the main thread raises it
                self.error = error
                return
            with self._lock:
                self._lost |= (set(held) - still) & set(self._held)  # not those that ended while the storage was asked


@contextmanager
def present(folder: Path, name: str) -> Iterator[None]:
    """A locked file in ``folder`` that tells neighbours on this machine that this worker lives: the lock dies with it."""
    path = folder / "workers" / name
    with FileLock(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def dead(folder: Path, name: str) -> bool:
    """Whether a worker of this machine and folder has died; of any other its lease tells.

    The kernel frees a lock as soon as its process is gone, so a neighbour's death is known at once, not when its lease
    ends.
    """
    if not name.startswith(f"{platform.node()}:"):
        return False
    path = folder / "workers" / name
    try:
        with FileLock(path, busy=BlockingIOError(f"{name} lives"), make=False):
            path.unlink(missing_ok=True)
            return True
    except (FileNotFoundError, BlockingIOError):
        return False
