"""A bar over the steps of several runs: it counts steps once, and a run has a line as it ends, unless there are too many."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from mue.lab.report.progress import RunProgress


def a_run(key: str, steps: int = 10) -> Any:
    return SimpleNamespace(key=key, plan=SimpleNamespace(training=SimpleNamespace(steps=steps)))


def test_a_bar_counts_what_is_trained_now_and_what_was_before() -> None:
    one, two, console = a_run("1" * 16), a_run("2" * 16), Console(file=io.StringIO(), width=120)
    with RunProgress(console, "runs", [one, two], lambda run: f"run {run.key[0]}") as progress:
        task = progress.bar.tasks[0]
        assert task.total == 20
        progress.moved(one, 4, 2.5)
        progress.moved(one, 6, 2.25)
        assert task.completed == 6 and task.fields["last"] == "loss 2.250"
        progress.ended(one, {"val_loss": 2.0, "seconds": 3.0}, fresh=True)
        progress.ended(two, {"val_loss": None, "seconds": 1.0}, fresh=False)
        assert task.completed == 20 and progress.fresh == 1
    lines = console.file.getvalue()  # type: ignore[attr-defined]
    assert "run 1  loss 2.0000  3 s, 11111111" in lines and "run 2  diverged  done before, 22222222" in lines


def test_hundreds_of_runs_have_a_bar_alone() -> None:
    run, console = a_run("1" * 16), Console(file=io.StringIO(), width=120)
    with RunProgress(console, "runs", [run], label=None) as progress:
        progress.ended(run, {"val_loss": 2.0, "seconds": 3.0}, fresh=True)
        assert progress.bar.tasks[0].completed == 10
    assert "11111111" not in console.file.getvalue()  # type: ignore[attr-defined]
