"""Progress for people: one bar over all steps of a phase, and a line for each run as it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mue.lab.runners.listener import RunListener
from mue.lab.train.run import Run

Label = Callable[[Run], str]


class RunProgress(RunListener):
    """``with RunProgress(console, "sweep", runs, label) as p: run_all(..., listener=p)``.

    Args:
        runs: all that are to come; the bar counts their steps, so that long and short ones weigh as they should.
        label: names a run in the line that it gets as it ends; None: of hundreds of runs, where only the bar moves.
    """

    def __init__(self, console: Console, title: str, runs: Sequence[Run], label: Label | None) -> None:
        self.console, self.label = console, label
        self.steps = {run.key: run.plan.training.steps for run in runs if run.plan.training is not None}
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

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def moved(self, run: Run, step: int, loss: float) -> None:
        self.bar.advance(self.task, step - self.seen.get(run.key, 0))
        self.bar.update(self.task, last=f"loss {loss:.3f}")
        self.seen[run.key] = step

    def ended(self, run: Run, result: dict[str, Any], *, fresh: bool) -> None:
        steps = self.steps.get(run.key, 0)
        self.bar.advance(self.task, steps - self.seen.get(run.key, 0))
        self.seen[run.key] = steps
        self.fresh += fresh
        if self.label is not None:
            loss = f"loss {result['val_loss']:.4f}" if result["val_loss"] is not None else "[red]diverged[/]"
            when = f"{result['seconds']:.0f} s" if fresh else "done before"
            line = f"  {self.label(run)}  {loss}  [dim]{when}, {run.key[:8]}[/]"
            self.console.print(line, highlight=False, soft_wrap=True)
