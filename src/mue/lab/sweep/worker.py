"""One worker of a sweep: claims trials, has them trained, tells how they ended; any number of them share one storage.

A thread renews the leases. What the storage says is lost (another worker has it by now) is given up here. Every worker
stays until the last trial has ended, its own or another's, so that each of them ends with the whole sweep.
"""

from __future__ import annotations

import math
import os
import platform
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from mue.lab.runners.runner import Busy, Done, Progress, Runner
from mue.lab.sweep.heartbeat import Heartbeat, dead, present
from mue.lab.sweep.listener import SweepListener
from mue.lab.sweep.sampler import Grid, sampler_of
from mue.lab.sweep.storage import StorageError
from mue.lab.sweep.trial import OPEN, State, Trial
from mue.lab.sweep.trials import Trials
from mue.lab.train.run import Run, Store
from mue.lab.valley.cell import CellValues
from mue.lab.valley.pruning import Curve, PartialRun, hopeless, rung

_LOOK = 2.0  # seconds between two looks at the other workers' trials; of 10,000 one takes less than a second
_AGAIN = 1.0  # seconds until a run that another process holds is tried again
_CURVE = 64  # points kept of a training curve: ten of them in what the pruning averages over (0.15 of the training)


class Worker:
    """Works on ``trials`` until all have ended.

    Args:
        run_of: the run of a trial's point. open_runner: called with the first run, when there is one to train.
        keep_weights: of each run that is trained.
    """

    def __init__(
        self,
        grid: Grid,
        trials: Trials,
        store: Store,
        run_of: Callable[[dict[str, float]], Run],
        open_runner: Callable[[Run], Runner],
        listener: SweepListener,
        keep_weights: bool = False,
    ) -> None:
        self.keep_weights = keep_weights
        self.grid, self.trials, self.store, self.run_of, self.listener = grid, trials, store, run_of, listener
        self.sampler = sampler_of(grid)
        self.open_runner = open_runner
        self.runner: Runner | None = None
        # Machine and process for people, and for whoever asks whether it is dead; the rest since process ids come
        # again.
        self.name = f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.mine: dict[str, tuple[Trial, Run]] = {}
        self.reached: dict[str, Progress] = {}
        self.again: list[tuple[float, Run]] = []  # runs that could not begin yet, and when to try them again
        self.leaving: set[str] = set()  # lost and told to stop: their last word is still to come
        self.rungs: dict[str, int] = {}  # passed by each run of ours, where hopeless ones are stopped
        self.looked = self.claims = -math.inf  # when the others were last looked at; when a claim is next worth trying

    def work(self) -> list[Trial]:
        """Work until each trial has ended, one's own or another's.

        Returns:
            All trials.

        Raises:
            mue.lab.sweep.storage.StorageError: the storage was lost for too long.
            ValueError, OSError, mue.lab.runners.runner.FailedError: as the runner raises them of a run.
        """
        with present(self.store.root, self.name), Heartbeat(self.trials, self.name) as self.heartbeat:
            try:
                while (ended := self._turn()) is None:
                    pass
                return ended
            finally:
                if self.runner:
                    self.runner.close()
                self.trials.database.patience = 5.0  # the lease ends by itself where this cannot be said
                with suppress(StorageError):
                    self.trials.release(self.name)

    def _turn(self) -> list[Trial] | None:
        """Claim, listen, look around; every trial once the sweep is over, else None."""
        self._drop_lost()
        now = time.monotonic()
        if now >= self.claims:
            self.claims = now if self._claim() else now + _AGAIN  # where nothing is to be had, not in every turn
        if not self.mine or now - self.looked >= _LOOK:
            found = self._look()
            if not self.mine and all(t.state not in OPEN for t in found) and not self._propose(found):
                return found
        self._listen()
        return None

    def _slots(self) -> int:
        """How many trials there is room for; one while there is no runner, for it is chosen by the first run."""
        return (self.runner.slots if self.runner else 1) - len(self.mine)

    def _claim(self) -> bool:
        """Take trials while there is room; False where there was none to take."""
        while self._slots() > 0:
            trial = self.trials.claim(self.name, {trial.id for trial, _ in self.mine.values()})
            if trial is None and not self._propose(self.trials.all()):
                return False
            if trial is not None:
                run = self.run_of(trial.point)
                self.mine[run.key] = (trial, run)
                self.heartbeat.hold(trial.id)
                self.runner = self.runner or self.open_runner(run)
                self._begin(run)
        return True

    def _begin(self, run: Run) -> None:
        """Hand a run to the runner, where one key may be in flight only once."""
        assert self.runner is not None
        if run.key in self.leaving:  # lost and claimed again, faster than its process could stop
            self.again.append((time.monotonic() + _AGAIN, run))
        else:
            self.runner.submit(run, keep_weights=self.keep_weights)

    def _propose(self, trials: list[Trial]) -> bool:
        """Add what the sampler asks for next; False where it asks for nothing (yet)."""
        points = self.sampler.propose(trials, max(1, self._slots()))
        added = self.trials.add(points, limit=self.grid.trials) if points else 0
        return added > 0 or (bool(points) and len(self.trials.all()) > len(trials))  # or another worker was faster

    def _listen(self) -> None:
        """Begin what had to wait, then hear for a second at most what the runner has to say."""
        now = time.monotonic()
        for when, run in [entry for entry in self.again if entry[0] <= now]:
            self.again.remove((when, run))
            if run.key in self.mine:
                self._begin(run)
        pause = min(_AGAIN, self.heartbeat.interval)
        messages = self.runner.wait(pause) if self.runner and (self.mine or self.leaving) else []
        for message in messages:
            if isinstance(message, Progress):
                self._progress(message)
            elif message.run.key in self.leaving:
                self.leaving.remove(message.run.key)
            elif isinstance(message, Busy):
                self.again.append((now + _AGAIN, message.run))
            else:
                self._done(message)
        if not messages and not self.leaving and len(self.mine) == len(self.again):
            time.sleep(pause / 2)  # nothing of ours is being trained

    def _progress(self, message: Progress) -> None:
        """Pass on how far a run is, and stop it where it is hopeless."""
        held = self.mine.get(message.key)
        if held is None:
            return
        trial, run = held
        self.reached[message.key] = message
        self.heartbeat.note(trial.id, {"step": message.step, "loss": message.loss})
        self.listener.moved(run, message.step, message.loss)
        if self.grid.stop_early and self._hopeless(trial, run, message.step):
            assert self.runner is not None
            self.runner.stop(message.key)

    def _hopeless(self, trial: Trial, run: Run, step: int) -> bool:
        """Whether the run has passed another rung and may be stopped there."""
        assert run.plan.training is not None
        steps = run.plan.training.steps
        passed = rung(step, steps)
        if passed <= self.rungs.get(run.key, 0):
            return False
        self.rungs[run.key] = passed
        cell = [t for t in self.trials.all() if CellValues.of(t.point) == CellValues.of(trial.point)]
        curves = self.trials.curves(cell)
        others = [_partial_run(t, curves[t.id]) for t in cell if t.id in curves]
        return hopeless(_partial_run(trial, self._curve(run.key)), others, steps)

    def _done(self, message: Done) -> None:
        """Tell the storage how a run ended; only what it counts is passed on."""
        key = message.run.key
        trial, run = self.mine.pop(key)
        self.claims = -math.inf  # there is room again
        curve = _thinned(self._curve(key)) if self.grid.stop_early else ()
        state: State = "PRUNED" if message.result["status"] == "stopped" else "COMPLETE"
        counted = self.trials.finish(self.name, trial.id, message.result, state, curve)
        self.heartbeat.let_go(trial.id)
        fresh = self.reached.pop(key, None) is not None
        self.rungs.pop(key, None)
        if counted:
            self.listener.ended(run, message.result, fresh=fresh)
        else:
            self.listener.say(
                f"run {key[:8]} was too late: another worker had taken it over; this result is not counted"
            )

    def _curve(self, key: str) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in self.store.metrics(key)]

    def _drop_lost(self) -> None:
        """Give up what the storage says another worker has: its result would not be counted."""
        if self.heartbeat.error:
            raise self.heartbeat.error
        lost = self.heartbeat.take_lost()
        for key, (trial, _) in list(self.mine.items()):
            if trial.id in lost:
                del self.mine[key]
                self.reached.pop(key, None)
                self.rungs.pop(key, None)
                self._leave(key)
                self.listener.say(
                    f"run {key[:8]} was taken over by another worker: no word from here for {self.trials.lease:g} s"
                )

    def _leave(self, key: str) -> None:
        """Stop a run that is not ours any more; its last message is still to come, and is not to be counted."""
        waiting = [entry for entry in self.again if entry[1].key == key]
        for entry in waiting:
            self.again.remove(entry)
        if not waiting and self.runner:
            self.leaving.add(key)
            self.runner.stop(key)

    def _look(self) -> list[Trial]:
        """Every trial; those of a worker that died on this machine are given back at once."""
        found = self.trials.all()
        for owner in {t.owner for t in found if t.state == "RUNNING" and t.owner not in (None, self.name)}:
            if dead(self.store.root, str(owner)):
                self.trials.release(str(owner))
        own = {trial.id: self.reached.get(key) for key, (trial, _) in self.mine.items()}
        self.listener.look([_with(t, own.get(t.id)) for t in found])
        self.looked = time.monotonic()
        return found


def _partial_run(trial: Trial, curve: Curve) -> PartialRun:
    return PartialRun(
        math.log2(trial.point["lr"]), trial.seed, curve, trial.loss if trial.state == "COMPLETE" else None
    )


def _with(trial: Trial, reached: Progress | None) -> Trial:
    """The trial with what this worker knows of it, which is newer than what the storage has."""
    return replace(trial, progress={"step": reached.step, "loss": reached.loss}, quiet=0.0) if reached else trial


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most ``_CURVE`` points, counted from the end: the last one says how far the run came."""
    every = -(-len(curve) // _CURVE) or 1
    return [(step, round(loss, 4)) for step, loss in curve[::-every][::-1]]
