"""A worker of a sweep with a runner that does as it is told: what is lost, claimed again, busy, hopeless."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.runners.runner import Busy, Done, Message, Progress
from mue.lab.sweep.result import summarise
from mue.lab.sweep.sampler import sampler_of
from mue.lab.sweep.spec import SweepSpec, sweep_from
from mue.lab.sweep.state import SweepState
from mue.lab.sweep.trials import Trials
from mue.lab.sweep.worker import Worker
from mue.lab.train.run import Run, Store
from mue.plan.toml import read_toml
from support.scripted_runner import Heard, Scripted, done


@pytest.fixture
def spec(experiment: Path) -> SweepSpec:
    return sweep_from(read_toml(experiment), experiment.parent)


def working(spec: SweepSpec, out: Path, runner: Scripted, count: int) -> tuple[Worker, Trials, Heard]:
    corpus = open_corpus(spec.source)
    trials = SweepState(out, spec, spec.identity(corpus.hash), None).open_trials()
    trials.add(sampler_of(spec.grid).points()[:count])
    data, heard = describe_data(spec.source, corpus), Heard()
    worker = Worker(spec.grid, trials, Store(out), lambda p: spec.run_at(p, data), lambda _: runner, heard)
    return worker, trials, heard


def test_a_run_that_is_lost_and_claimed_again_before_it_stopped(spec: SweepSpec, tmp_path: Path) -> None:
    """The runner may hear of it only once its first life has ended; the second is the one that counts."""

    def script(runner: Scripted) -> list[Message]:
        (run,) = runner.flying.values()
        if runner.turns == 1:
            trials.release(worker.name)
            assert trials.claim("another") is not None
            trials.release("another")
            worker.heartbeat._lost |= {t.id for t in trials.all()}  # as the next sign of life would find out
        if runner.turns in (1, 2):
            return [Progress(run.key, runner.turns, 3.0)]
        return [done(run, "stopped" if len(runner.submitted) == 1 else "finished")]

    runner = Scripted(script)
    worker, trials, heard = working(spec, tmp_path, runner, 1)
    (ended,) = worker.work()
    assert ended.state == "COMPLETE" and ended.loss == 2.5 and ended.owner == worker.name
    assert heard.counted == [(runner.submitted[0], "finished")]
    assert runner.stopped == runner.submitted[:1] and len(runner.submitted) == 2


def test_what_another_process_holds_is_tried_again(spec: SweepSpec, tmp_path: Path) -> None:
    def script(runner: Scripted) -> list[Message]:
        first = len(runner.submitted) <= 2
        return [Busy(run) if first else done(run) for run in runner.flying.values()]

    runner = Scripted(script)
    worker, _, heard = working(spec, tmp_path, runner, 2)
    assert [t.state for t in worker.work()] == ["COMPLETE"] * 2
    assert len(runner.submitted) == 4 and len(heard.counted) == 2


def test_a_result_that_is_too_late_is_not_counted(spec: SweepSpec, tmp_path: Path) -> None:
    def script(runner: Scripted) -> list[Message]:
        (run,) = runner.flying.values()
        trials.release(worker.name)
        taken = trials.claim("another")
        assert taken is not None
        trials.finish("another", taken.id, {**done(run).result, "val_loss": 2.25})
        return [done(run)]

    runner = Scripted(script)
    worker, trials, heard = working(spec, tmp_path, runner, 1)
    (ended,) = worker.work()
    assert (ended.owner, ended.loss) == ("another", 2.25)
    assert heard.counted == [] and any("too late" in words for words in heard.words)


def test_a_hopeless_run_is_stopped_and_is_a_wall_in_the_fit(spec: SweepSpec, tmp_path: Path) -> None:
    """Learning rates from the valley outwards; the ends crawl from where they began."""
    octaves = (0, -1, 1, -2, 2, -3, 3, 6, -6)
    lrs = tuple(2.0 ** (x - 8) for x in sorted(octaves))
    grid = replace(spec.grid, lr=lrs, weight_decay=(0.1,), init_std=(0.02,), seeds=(0,), stop_early=True)
    wide = replace(spec, grid=grid)

    def loss_at(run: Run, step: int) -> float:
        assert run.plan.tuned is not None
        far = math.log2(run.plan.tuned.lr) + 8
        return 6 - (4 - 0.1 * far**2) * (1 - math.exp(-step / 5))

    def script(runner: Scripted) -> list[Message]:
        (run,) = runner.flying.values()
        if run.key in runner.stopped:
            return [done(run, "stopped")]
        path = store.folder(run.key) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        step = 2 + len(store.metrics(run.key)) * 2
        if step > 40:
            return [Done(run, {**done(run).result, "val_loss": loss_at(run, 40)})]
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss_at(run, step)}) + "\n")
        return [Progress(run.key, step, loss_at(run, step))]

    runner, store = Scripted(script), Store(tmp_path)
    runner.slots = 1
    worker, trials, _ = working(wide, tmp_path, runner, 0)
    trials.add([{"lr": 2.0 ** (x - 8), "weight_decay": 0.1, "init_std": 0.02, "seed": 0} for x in octaves])
    ended = worker.work()
    state = {round(math.log2(t.point["lr"])) + 8: t.state for t in ended}
    stopped = [x for x, s in state.items() if s == "PRUNED"]
    assert {6, -6} <= set(stopped) and min(map(abs, stopped)) > 2
    swept = summarise(wide, ended)
    assert (swept.runs, swept.stopped) == (9 - len(stopped), len(stopped)) and swept.best.valley is not None
    assert len(swept.best.points) == 9 and swept.best.valley.minimum == pytest.approx(-8, abs=0.05)
    assert summarise(wide, [t for t in ended if t.state == "COMPLETE"]).best.valley != swept.best.valley
