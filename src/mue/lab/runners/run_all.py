"""Several runs to their ends: a small loop over a runner."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from mue.lab.runners.calibrate import cores
from mue.lab.runners.listener import RunListener
from mue.lab.runners.open import open_runner
from mue.lab.runners.runner import Done, Progress
from mue.lab.train.run import BusyError, Run, Store


def run_all(
    runs: Sequence[Run],
    store: Store,
    *,
    workers: int | None = None,
    checkpoint_seconds: float = 10.0,
    listener: RunListener | None = None,
    kind: str = "processes",
    keep_weights: Container[str] = (),
) -> dict[str, dict[str, Any]]:
    """Train every run that has no result yet, and wait for all of them.

    Args:
        store: where the runs' folders are, finished ones included.
        workers, checkpoint_seconds, kind: as :func:`mue.lab.runners.open.open_runner` takes them.
        listener: told of each run as it goes, and of those that were trained before first.
        keep_weights: keys of the runs whose ``model.safetensors`` stays in their folder.

    Returns:
        Key → result of all runs. Those with the same key are trained once.

    Raises:
        ValueError, OSError: what was wrong with a run's input or the disk.
        mue.lab.runners.runner.FailedError: an error of ours, with its text.
        mue.lab.train.run.BusyError: another process trains one of them.
    """
    listener = listener or RunListener()
    # Of equal keys the first; turned back below, into the order that was asked for.
    distinct = {run.key: run for run in reversed(runs)}
    results: dict[str, dict[str, Any]] = {}
    moving: set[str] = set()

    for key, run in reversed(distinct.items()):
        known = store.result(key)
        if known is not None:
            results[key] = known
            listener.ended(run, known, fresh=False)
    todo = [run for key, run in reversed(distinct.items()) if key not in results]
    if not todo:
        return results
    count = min(len(todo), workers or cores())
    runner = open_runner(
        kind, store, workers=count, checkpoint_seconds=checkpoint_seconds, example=todo[0], runs=len(todo)
    )
    try:
        for run in todo:
            runner.submit(run, keep_weights=run.key in keep_weights)
        while len(results) < len(distinct):
            for message in runner.wait():
                if isinstance(message, Done):
                    results[message.run.key] = message.result
                    listener.ended(message.run, message.result, fresh=message.run.key in moving)
                elif isinstance(message, Progress):
                    moving.add(message.key)
                    listener.moved(distinct[message.key], message.step, message.loss)
                else:
                    raise BusyError(f"run {message.run.key} is being trained by another process")
    finally:
        runner.close()
    return results
