"""Who is told of runs as they go: displays, progress bars, sinks of metrics. One interface, whatever trains the runs.

class Mine(RunListener):
    def ended(self, run, result, *, fresh): ...

with Mine() as listener:
    run_all(runs, store, listener=listener)          # or run_sweep(..., listener=listener)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from mue.lab.train.run import Run


class RunListener:
    """Takes no notice of anything: override what you want to hear.

    It is called from the thread that waits for the runner, so what takes long holds that up, and what it raises ends
    the training it listens to.
    """

    def moved(self, run: Run, step: int, loss: float) -> None:
        """A run has reached ``step``, and its metrics may have new rows. ``loss``: that step's, in its task's unit."""

    def ended(self, run: Run, result: dict[str, Any], *, fresh: bool) -> None:
        """A run has its result (what ``result.json`` holds). ``fresh``: trained now, not found in its folder."""

    def say(self, text: str) -> None:
        """Something happened that people should know."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The runs are over, or an error ended them."""


ListenerOf = Callable[[str, Sequence[Run]], AbstractContextManager[RunListener]]
"""Makes the listener of a batch of runs: called with a title for people, and the runs."""
