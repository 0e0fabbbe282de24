"""Several runs to their ends: a small loop over a runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mue.lab.runners.calibrate import cores
from mue.lab.runners.open import open_runner
from mue.lab.runners.runner import Done, Progress
from mue.lab.train.run import BusyError, Run, Store

Event = Callable[[str, int, float], None]
"""Called with (run key, step, loss) as runs advance."""


def run_all(
    runs: Sequence[Run],
    store: Store,
    *,
    workers: int | None = None,
    checkpoint_seconds: float = 10.0,
    on_event: Event | None = None,
    on_done: Callable[[Run, dict[str, Any]], None] | None = None,
    kind: str = "processes",
) -> dict[str, dict[str, Any]]:
    """Train every run that has no result yet; returns key → result of all of them.

    Runs with the same key are trained once. Results appear in ``on_done`` as they come, known ones first.

    Raises:
        ValueError, OSError: what a run said of its input or of the disk. mue.lab.runners.runner.FailedError: an error of ours,
        with its text. mue.lab.train.run.BusyError: another process trains one of them.
    """
    distinct = {run.key: run for run in reversed(runs)}
    results: dict[str, dict[str, Any]] = {}

    def done(run: Run, result: dict[str, Any]) -> None:
        results[run.key] = result
        if on_done:
            on_done(run, result)

    for key, run in reversed(distinct.items()):
        known = store.result(key)
        if known is not None:
            done(run, known)
    todo = [run for key, run in reversed(distinct.items()) if key not in results]
    if not todo:
        return results
    count = min(len(todo), workers or cores())
    runner = open_runner(
        kind, store, workers=count, checkpoint_seconds=checkpoint_seconds, example=todo[0], runs=len(todo)
    )
    try:
        for run in todo:
            runner.submit(run)
        while len(results) < len(distinct):
            for message in runner.wait():
                if isinstance(message, Done):
                    done(message.run, message.result)
                elif isinstance(message, Progress):
                    if on_event:
                        on_event(message.key, message.step, message.loss)
                else:
                    raise BusyError(f"run {message.run.key} is being trained by another process")
    finally:
        runner.close()
    return results
