"""A bar over the steps of several runs: it counts steps once, and a run has a line as it ends, unless there are too many."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from mue.lab.report.progress import Pace, RunProgress
from mue.lab.sweep.display import SweepDisplay
from mue.lab.sweep.trial import Trial


def a_run(key: str, steps: int = 10) -> Any:
    return SimpleNamespace(key=key, plan=SimpleNamespace(training=SimpleNamespace(steps=steps, batch=100)))


def test_a_bar_counts_what_is_trained_now_and_what_was_before() -> None:
    one, two, console = a_run("1" * 16), a_run("2" * 16), Console(file=io.StringIO(), width=120)
    with RunProgress(console, "runs", [one, two], lambda run: f"run {run.key[0]}") as progress:
        task = progress.bar.tasks[0]
        assert task.total == 20
        progress.moved(one, 4, 2.5)
        progress.moved(one, 6, 2.25)
        assert task.completed == 6 and task.fields["last"].startswith("loss 2.250")
        progress.ended(one, {"val_loss": 2.0, "seconds": 3.0}, fresh=True)
        progress.ended(two, {"val_loss": None, "seconds": 1.0}, fresh=False)
        assert task.completed == 20 and progress.fresh == 1
    lines = console.file.getvalue()  # type: ignore[attr-defined]
    assert "run 1  loss 2.0000  3 s, 11111111" in lines and "run 2  diverged  done before, 22222222" in lines


def test_a_run_that_nobody_foresaw_lengthens_the_bar() -> None:
    """A study widens a valley while it runs."""
    known, wider, console = a_run("1" * 16), a_run("2" * 16, 30), Console(file=io.StringIO(), width=120)
    with RunProgress(console, "study", [known], lambda run: f"run {run.key[0]}") as progress:
        progress.ended(known, {"val_loss": 2.0, "seconds": 3.0}, fresh=True)
        progress.moved(wider, 4, 2.5)
        assert progress.bar.tasks[0].total == 40 and progress.bar.tasks[0].completed == 14
        progress.ended(wider, {"val_loss": 2.0, "seconds": 3.0}, fresh=True)
        assert progress.bar.tasks[0].completed == 40
    assert "run 2  loss 2.0000" in console.file.getvalue()  # type: ignore[attr-defined]


def test_hundreds_of_runs_have_a_bar_alone() -> None:
    run, console = a_run("1" * 16), Console(file=io.StringIO(), width=120)
    with RunProgress(console, "runs", [run], label=None) as progress:
        progress.ended(run, {"val_loss": 2.0, "seconds": 3.0}, fresh=True)
        assert progress.bar.tasks[0].completed == 10
    assert "11111111" not in console.file.getvalue()  # type: ignore[attr-defined]


class Clock:
    """Seconds as a test says them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_pipe_is_told_every_minute() -> None:
    """Step, loss, tokens per second and what is left; of a run that goes on, the speed of this session alone."""
    clock, console, run = Clock(), Console(file=io.StringIO(), width=40), a_run("1" * 16, 1000)
    lines: list[list[str]] = []
    with RunProgress(console, "train", [run], lambda run: "run", Pace(clock)) as progress:
        for clock.now, step in ((1.0, 500), (31.0, 530), (61.0, 560), (62.0, 561), (121.0, 620)):
            progress.moved(run, step, 2.5)
            lines.append(console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    assert [len(found) for found in lines] == [0, 0, 1, 1, 2]
    assert lines[-1] == [
        "train: step 560 of 1,000, loss 2.5000, 100 tokens/s, 0:07:20 left",
        "train: step 620 of 1,000, loss 2.5000, 100 tokens/s, 0:06:20 left",
    ]


def test_a_terminal_has_the_bar_and_no_lines() -> None:
    clock, run = Clock(), a_run("1" * 16, 1000)
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with RunProgress(console, "train", [run], lambda run: "run", Pace(clock)) as progress:
        for clock.now, step in ((1.0, 500), (61.0, 560)):
            progress.moved(run, step, 2.5)
        assert progress.bar.tasks[0].fields["last"] == "loss 2.500  100 tokens/s"
    assert "train: step" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_sweep_in_a_pipe_is_told_of_all_workers_runs() -> None:
    clock, console = Clock(), Console(file=io.StringIO(), width=40)
    point = {"lr": 0.01, "weight_decay": 0.1, "init_std": 0.1, "seed": 0.0}

    def trials(*steps: int) -> list[Trial]:
        ended = Trial(0, 0, "COMPLETE", point, {"val_loss": 2.0, "step": 100})
        early = Trial(1, 1, "PRUNED", point, {"val_loss": None, "step": 40})
        running = [Trial(i, i, "RUNNING", point, progress={"step": s, "loss": 2.25}) for i, s in enumerate(steps, 2)]
        return [ended, early, *running, Trial(9, 9, "WAITING", point)]

    display = SweepDisplay(console, "sweep", 100, 10, Pace(clock))  # not opened: its table at the end is another test's
    for clock.now, steps in ((0.0, (0, 0)), (60.0, (20, 40))):
        display.look(trials(*steps))
    [before, line] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "2 of 5 trials were done before" in before
    assert line.strip() == "sweep: step 200 of 440, loss 2.2500, 10 tokens/s, 0:04:00 left"
