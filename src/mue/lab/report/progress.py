"""Progress for people: one bar over all steps of a phase, and a line for each run as it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mue.lab.train.run import Run

Label = Callable[[Run], str]


class RunProgress:
    """``with RunProgress(console, "sweep", runs, label) as p: run_all(..., on_event=p.event, on_done=p.done)``."""

    def __init__(self, console: Console, title: str, runs: Sequence[Run], label: Label) -> None:
        self.console, self.label = console, label
        self.steps = {run.key: run.plan.training.steps for run in runs if run.plan.training is not None}
        self.seen: dict[str, int] = {}
        self.ended: set[str] = set()
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

    def __enter__(self) -> RunProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def event(self, key: str, step: int, loss: float) -> None:
        """A run has reached ``step``."""
        self.bar.advance(self.task, step - self.seen.get(key, 0))
        self.bar.update(self.task, last=f"loss {loss:.3f}")
        self.seen[key] = step

    def done(self, run: Run, result: dict[str, Any]) -> None:
        """A run has ended, now or in an earlier session."""
        key = run.key
        fresh = key in self.seen
        self.bar.advance(self.task, self.steps.get(key, 0) - self.seen.get(key, 0))
        self.seen[key] = self.steps.get(key, 0)
        if key in self.ended:
            return
        self.ended.add(key)
        self.fresh += fresh
        loss = f"loss {result['val_loss']:.4f}" if result["val_loss"] is not None else "[red]diverged[/]"
        when = f"{result['seconds']:.0f} s" if fresh else "done before"
        self.console.print(f"  {self.label(run)}  {loss}  [dim]{when}, {key[:8]}[/]", highlight=False, soft_wrap=True)
