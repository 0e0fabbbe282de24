"""Runs of one kind on their way together: they join and leave a stack between its steps, each with its own files."""

from __future__ import annotations

import time
from collections.abc import Container
from contextlib import ExitStack
from typing import Any

from mue.lab.data import Data
from mue.lab.train.run import Run, Store
from mue.lab.train.session import TrainingSession, open_session
from mue.lab.train.stacked_session import StackedSession

# At most this share of the time goes into checkpoints, however many runs have one to write: a stack of 32 writes 32
# files in a row. But they are at most so much rarer than asked for, since a kill costs what was done since.
CHECKPOINT_SHARE, CHECKPOINT_RARER = 0.05, 12


class StackedRuns:
    """Runs of one kind (``stack_kind``), as many as join, trained together; compiled or not.

    Eagerly the stack always has the size of what is in it. A compiled one is made again only where that pays for compiling.

    Attributes:
        sessions: of the runs under way, by key. stack: the program that computes them; None before the first step.
        interval: seconds between checkpoints; it grows, at most to ``longest``, where many runs have one to write.
        made_seconds, step_seconds: what the last step took that made the stack anew, and the last that did not.
    """

    def __init__(self, *, compiled: bool = False, checkpoint_seconds: float = 10.0) -> None:
        self.compiled, self.interval, self.longest = compiled, checkpoint_seconds, CHECKPOINT_RARER * checkpoint_seconds
        self.stack: StackedSession | None = None
        self.sessions: dict[str, TrainingSession] = {}
        self.opened: dict[str, ExitStack] = {}
        self.made_seconds = self.step_seconds = 0.0

    def join(self, run: Run, store: Store, corpus: Data, *, keep_weights: bool = False) -> dict[str, Any] | None:
        """Begin a run or go on with it; the next step has it in the stack.

        Args:
            keep_weights: leave ``model.safetensors`` in its folder when it ends.

        Returns:
            Its result, where it has one already.

        Raises:
            BusyError, ValueError: as ``mue.lab.train.session.train``.
        """
        with ExitStack() as opened:
            session = open_session(run, store, corpus, opened)
            if not isinstance(session, TrainingSession):
                return session
            session.keep_weights = keep_weights
            self.sessions[run.key], self.opened[run.key] = session, opened.pop_all()
        return None

    def advance(self, stop: Container[str]) -> list[tuple[TrainingSession, dict[str, Any] | None]]:
        """One step of all of them.

        Args:
            stop: keys to give up.

        Returns:
            The sessions with a logged step, each with its result where it has ended. Those are no longer in the stack.
        """
        started = time.monotonic()
        stack, new = self._fitting()
        stack.step()
        seconds = time.monotonic() - started
        self.made_seconds, self.step_seconds = (seconds, self.step_seconds) if new else (self.made_seconds, seconds)
        for session in self.sessions.values():  # equal shares: seconds of a sweep's runs then add up to what it took
            session.seconds += seconds / len(self.sessions)
        started = time.monotonic()
        news: list[tuple[TrainingSession, dict[str, Any] | None]] = []
        for place, session in stack.occupied:
            session.maybe_checkpoint(self.interval, session.key in stop)
            if session.status is not None:
                news.append((session, session.end()))
                stack.drop(place)
                del self.sessions[session.key]
                self.opened.pop(session.key).close()
            elif session.logged:
                news.append((session, None))
        self.interval = min(self.longest, max(self.interval, (time.monotonic() - started) / CHECKPOINT_SHARE))
        return news

    def close(self) -> None:
        """Let go of all runs; their last checkpoints stay."""
        for opened in self.opened.values():
            opened.close()
        self.sessions.clear()
        self.opened.clear()
        self.stack = None

    def _fitting(self) -> tuple[StackedSession, bool]:
        """The stack, with every run in it; and whether it was made now."""
        size, wanted = len(self.stack.sessions) if self.stack else 0, len(self.sessions)
        new = size < wanted or (size > wanted and not self.compiled) or (size > wanted and self._shrinking_pays())
        if new or self.stack is None:
            # What moved into the old one moves on: its tensors are views of that one's banks until they are of the new
            # one's.
            self.stack = StackedSession(next(iter(self.sessions.values())), wanted, compiled=self.compiled)
        inside = {session.key for _, session in self.stack.occupied}
        for key, session in self.sessions.items():
            if key not in inside:
                self.stack.put(self.stack.sessions.index(None), session)
        return self.stack, new

    def _shrinking_pays(self) -> bool:
        """A smaller compiled stack: time saved on the steps that are left against the time that compiling took."""
        assert self.stack is not None
        left = max(session.steps - session.step for session in self.sessions.values())
        idle = 1 - len(self.sessions) / len(self.stack.sessions)
        return left * self.step_seconds * idle > self.made_seconds
