"""What a sweep tells beyond its runs: how all of its trials stand, on whatever machine they are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from mue.lab.runners.listener import RunListener
from mue.lab.sweep.trial import Trial
from mue.lab.train.run import Run


class SweepListener(RunListener):
    """Told of this worker's runs as any :class:`RunListener` is; of those that ended only once they were counted."""

    def look(self, trials: Sequence[Trial]) -> None:
        """How every trial stands, every few seconds; running ones with what their workers last said."""


class Broadcast(SweepListener):
    """Several listeners as one, in their order."""

    def __init__(self, *listeners: RunListener) -> None:
        self.listeners = listeners
        self._opened = ExitStack()

    def look(self, trials: Sequence[Trial]) -> None:
        for listener in self.listeners:
            if isinstance(listener, SweepListener):
                listener.look(trials)

    def moved(self, run: Run, step: int, loss: float) -> None:
        for listener in self.listeners:
            listener.moved(run, step, loss)

    def ended(self, run: Run, result: dict[str, Any], *, fresh: bool) -> None:
        for listener in self.listeners:
            listener.ended(run, result, fresh=fresh)

    def say(self, text: str) -> None:
        for listener in self.listeners:
            listener.say(text)

    def __enter__(self) -> Self:
        for listener in self.listeners:
            self._opened.enter_context(listener)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)
