"""The one sweep: learning rate × weight decay × init std (× betas) of the base, by any number of workers, fitted as valleys.

Rerunning a sweep goes on where it stopped, and a finished run never runs again: if the storage is lost, the results in the
folder's runs are found and told anew.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from mue.lab.data import Data
from mue.lab.data.spec import describe_data
from mue.lab.runners.open import open_runner
from mue.lab.runners.runner import Runner
from mue.lab.sweep.listener import SweepListener
from mue.lab.sweep.result import SweepResult, summarise
from mue.lab.sweep.spec import SweepSpec
from mue.lab.sweep.state import SweepState
from mue.lab.sweep.trial import OPEN
from mue.lab.sweep.worker import Worker
from mue.lab.train.run import Run, Store


def run_sweep(
    spec: SweepSpec,
    out: Path,
    corpus: Data,
    *,
    storage: str | None = None,
    study: str | None = None,
    lease: float | None = None,
    workers: int | None = None,
    listener: SweepListener | None = None,
    checkpoint_seconds: float = 10.0,
    resume: bool = False,
    keep_weights: bool = False,
) -> SweepResult:
    """Work on the sweep until every trial has ended, together with whoever shares its storage, and fit it.

    Args:
        out: this machine's folder: checkpoints, metrics, and in the end ``result.json``. Workers on one machine may share it.
        storage: the URL of one to share with other machines; None: what the folder says, for a new one a file in it.
        study: the sweep's name in the storage, where several of one base share it; None: what the folder says, for a new one its identity.
        lease: seconds without a sign of life until a worker's runs go to others.
        workers, checkpoint_seconds: as the runner takes them (``mue.lab.runners.runner``).
        keep_weights: leave ``model.safetensors`` in the folder of each run that is trained here.
        resume: the grid is not ``spec``'s but that of whoever started last.

    Raises:
        ValueError: the folder belongs to another experiment, the study to another sweep; every run diverged.
        mue.lab.sweep.storage.StorageError: the storage was lost for longer than an hour.
    """
    listener = listener or SweepListener()
    state = SweepState.start(out, spec, corpus, storage, study)
    trials = state.open_trials(lease, partial(_trouble, listener))
    before = state.with_current_grid(trials)
    if resume:
        state = replace(state, spec=replace(spec, grid=before.spec.grid))
    if gone := state.ask(trials, before):
        listener.say(f"{gone} open trials are not in the file any more: withdrawn")
    store, data = Store(out), describe_data(spec.source, corpus)

    def open_for(run: Run) -> Runner:
        left = sum(t.state in OPEN for t in trials.all())  # how much there is to train decides whether compiling pays
        runner = open_runner(
            spec.grid.runner,
            store,
            workers=workers,
            checkpoint_seconds=checkpoint_seconds,
            example=run,
            runs=max(1, left),
        )
        listener.say(runner.why)
        return runner

    while True:
        worker = Worker(
            state.spec.grid, trials, store, partial(state.spec.run_at, data=data), open_for, listener, keep_weights
        )
        ended = worker.work()
        # Else a worker that was there before the grid was widened would overwrite the result with the narrower one.
        now = state.with_current_grid(trials)
        if now == state:
            break
        state = now  # somebody asked for something else meanwhile, which may not have ended
    result = summarise(state.spec, ended)
    state.save()
    state.save_result(result)
    return result


def _trouble(listener: SweepListener, what: str, seconds: float) -> None:
    listener.say(
        f"the storage does not answer ({what}), for {seconds:.0f} s now: it is asked again, and what trains goes on"
    )
