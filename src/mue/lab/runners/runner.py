"""What a runner is: runs are submitted, progress is heard of, runs are stopped. Where and how they are trained is the runner's affair.

    runner = open_runner("processes", store)         # mue.lab.runners.open
    runner.submit(run)                               # as many as runner.slots at once keep the machine busy
    for message in runner.wait(timeout=1.0): ...     # Progress, Done, or Busy

Whatever the kind, a run leaves the same files in the store (``mue.lab.train.run``), and a run that was given up or whose
process died goes on from its checkpoint when it is submitted again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from mue.lab.train.run import Run

KINDS = ("auto", "processes", "stacked")


@dataclass(frozen=True)
class Progress:
    """A run has reached ``step``; ``loss`` is that step's training loss, in its task's unit."""

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

    why: str
    """What it is, and why this kind was chosen: a sentence for people."""

    @property
    def slots(self) -> int:
        """How many runs it wants in flight at once. More may be submitted; they wait their turn."""

    def submit(self, run: Run, *, keep_weights: bool = False) -> None:
        """Train ``run``; a finished one comes back at once with its stored result. One key is in flight only once.

        Args:
            keep_weights: leave ``model.safetensors`` in its folder; of one that was finished before nothing is made anew.
        """

    def wait(self, timeout: float | None = None) -> list[Message]:
        """What has happened, oldest first: blocks until there is something, or ``timeout`` seconds; [] on timeout
        and where nothing is in flight.

        Raises:
            ValueError, OSError: what was wrong with a run's input or the disk; that run is no longer in flight.
            FailedError: an error of ours, with its text; also where a run's process died again and again. That run is no longer
                in flight either.
        """

    def stop(self, key: str) -> None:
        """Give a run up: it ends as :class:`Done` with status "stopped". Nothing happens to one that has ended."""

    def close(self) -> None:
        """End what is in flight at once; checkpoints stay."""
