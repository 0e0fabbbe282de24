"""The loop of a study: every run once, the transferred values first, further octaves where a valley has no other side yet."""

from __future__ import annotations

import time

from mue.lab.runners.listener import RunListener
from mue.lab.runners.open import open_runner
from mue.lab.runners.runner import Busy, Done, Progress, Runner
from mue.lab.study.rows import StudyFolder
from mue.lab.study.schedule import Schedule
from mue.lab.train.run import Run

_ELSEWHERE = 5.0  # seconds until a run that another process trains is asked for again


def run_study(
    schedule: Schedule,
    folder: StudyFolder,
    *,
    workers: int | None = None,
    minutes: float | None = None,
    listener: RunListener | None = None,
    keep_weights: bool = False,
) -> int:
    """Train what the study has no rows of. Stop it, kill it, start it again, also twice at once in one folder: nothing is lost or redone.

    Args:
        schedule: of the study on its corpus. folder: where rows and runs are. workers: training processes (None: one for each core).
        minutes: begin no run after so many; those under way are finished. None: train all.
        listener: told of each run as it goes. keep_weights: leave each run's ``model.safetensors`` in its folder.

    Returns:
        How many runs are still to be trained.

    Raises:
        ValueError, OSError: what was wrong with a run's input or the disk.
        mue.lab.runners.runner.FailedError: an error of ours, with its text.
    """
    folder.begin(schedule.spec, schedule.data)
    until = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    runner: Runner | None = None
    flying: dict[str, Run] = {}
    moved: set[str] = set()
    listener = listener or RunListener()
    try:
        while True:
            missing = [p.run for p in schedule.missing(folder.rows()) if p.run.key not in flying]
            if time.monotonic() < until and missing:
                if runner is None:
                    runner = open_runner("processes", folder.store, workers=workers, example=missing[0])
                for run in missing[: runner.slots - len(flying)]:
                    flying[run.key] = run
                    runner.submit(run, keep_weights=keep_weights)
            if runner is None or not flying:
                return len(missing)
            _hear(runner, folder, flying, moved, listener)
    finally:
        if runner is not None:
            runner.close()


def _hear(runner: Runner, folder: StudyFolder, flying: dict[str, Run], moved: set[str], listener: RunListener) -> None:
    """Wait until a run has ended, and write its row.

    Args:
        flying: runs under way, by key. moved: keys of those that were heard of while they trained; the others were done before.
    """
    ended = False
    while not ended:
        for message in runner.wait():
            if isinstance(message, Progress):
                moved.add(message.key)
                listener.moved(flying[message.key], message.step, message.loss)
                continue
            run = flying.pop(message.run.key)
            ended = True
            if isinstance(message, Done):
                if run.key not in folder.rows():
                    folder.add(run, message.result)
                listener.ended(run, message.result, fresh=run.key in moved)
            elif isinstance(message, Busy):  # whoever trains it writes its row
                time.sleep(_ELSEWHERE)
