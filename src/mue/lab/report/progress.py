"""Progress for people: one bar over all steps of a phase, and a line for each run as it ends; in a pipe, a line every minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mue.lab.runners.listener import RunListener
from mue.lab.train.run import Run

Label = Callable[[Run], str]


class Pace:
    """How fast training goes, over what was trained since the first look at it; ``now``: a clock, in seconds."""

    EVERY = 60.0  # seconds between two lines

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._first: tuple[float, int, int] | None = (
            None  # time, steps, tokens: what was trained before is no speed of ours
        )
        self._last = now()
        self.tokens_per_second = self._steps_per_second = math.nan

    def moved(self, steps: int, tokens: int) -> None:
        """So many are done by now, those of earlier sessions among them."""
        began, first_steps, first_tokens = self._first = self._first or (self.now(), steps, tokens)
        if (seconds := self.now() - began) > 0:
            self.tokens_per_second = (tokens - first_tokens) / seconds
            self._steps_per_second = (steps - first_steps) / seconds

    def line(self, title: str, steps: int, total: int, loss: float) -> str | None:
        """Once a minute how far it is, for where no bar can be drawn; None in between.

        Args:
            title: of what is trained. steps: done by now. total: of all that is to come. loss: the last one heard of.
        """
        if self.now() - self._last < self.EVERY or self._first is None:
            return None
        self._last = self.now()
        left = (total - steps) / self._steps_per_second if self._steps_per_second > 0 else math.nan
        parts = [f"{title}: step {steps:,} of {total:,}", f"loss {loss:.4f}"]
        parts += [f"{self.tokens_per_second:,.0f} tokens/s"] if self.tokens_per_second > 0 else []
        return ", ".join([*parts, *([f"{timedelta(seconds=round(left))} left"] if math.isfinite(left) else [])])


class RunProgress(RunListener):
    """``with RunProgress(console, "sweep", runs, label) as p: run_all(..., listener=p)``.

    Args:
        runs: all that are known to come; the bar counts their steps, so that long and short ones weigh as they should. One that is heard of
            and was not known (a valley that is widened) lengthens it.
        label: names a run in the line that it gets as it ends; None: of hundreds of runs, where only the bar moves.
        pace: of another clock, for tests.
    """

    def __init__(
        self, console: Console, title: str, runs: Sequence[Run], label: Label | None, pace: Pace | None = None
    ) -> None:
        self.console, self.title, self.label, self.pace = console, title, label, pace or Pace()
        self.batch: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        for run in runs:
            self._know(run)
        self.seen: dict[str, int] = {}
        self.fresh = 0  # runs trained in this session
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}"),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task(title, total=sum(self.steps.values()), last="")

    def _know(self, run: Run) -> None:
        assert run.plan.training is not None
        self.batch[run.key], self.steps[run.key] = run.plan.training.batch, run.plan.training.steps

    def _hear_of(self, run: Run) -> None:
        if run.key not in self.steps:
            self._know(run)
            self.bar.update(self.task, total=sum(self.steps.values()))

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def moved(self, run: Run, step: int, loss: float) -> None:
        self._hear_of(run)
        self.bar.advance(self.task, step - self.seen.get(run.key, 0))
        self.seen[run.key] = step
        done = sum(self.seen.values())
        self.pace.moved(done, sum(step * self.batch[key] for key, step in self.seen.items()))
        speed = f"  {self.pace.tokens_per_second:,.0f} tokens/s" if self.pace.tokens_per_second > 0 else ""
        self.bar.update(self.task, last=f"loss {loss:.3f}{speed}")
        if not self.console.is_terminal and (line := self.pace.line(self.title, done, sum(self.steps.values()), loss)):
            self.console.print(line, highlight=False, soft_wrap=True)

    def ended(self, run: Run, result: dict[str, Any], *, fresh: bool) -> None:
        self._hear_of(run)
        steps = self.steps[run.key]
        self.bar.advance(self.task, steps - self.seen.get(run.key, 0))
        self.seen[run.key] = steps
        self.fresh += fresh
        if self.label is not None:
            loss = f"loss {result['val_loss']:.4f}" if result["val_loss"] is not None else "[red]diverged[/]"
            when = f"{result['seconds']:.0f} s" if fresh else "done before"
            line = f"  {self.label(run)}  {loss}  [dim]{when}, {run.key[:8]}[/]"
            self.console.print(line, highlight=False, soft_wrap=True)
