"""Fault drills: four workers on PostgreSQL and on SQLite, killed at random; nothing lost, nothing counted twice.

The short ones stand in for the training; ``make slow`` trains, kills a hundred times on each storage, and writes docs/results/drill.json.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.runners.run_all import run_all
from mue.lab.sweep.spec import sweep_from
from mue.lab.sweep.trial import Trial
from mue.lab.train.run import Store
from mue.plan.toml import read_toml
from mue.util.files import write_json
from support.drill import Drill
from support.paths import ROOT
from support.postgres import Wire, postgres

GRID = "lr = [0.002, 0.004, 0.008, 0.016, 0.032]\nseeds = [0, 1, 2, 3]\nweight_decay = [0.1]\ninit_std = [0.05, 0.1]\n"
SEARCH = "lr = [0.002, 0.032]\nseeds = [0, 1, 2]\nweight_decay = [0.1]\ninit_std = [0.1]\nsampler = 'random'\n"
EVIDENCE = ROOT / "docs" / "results" / "drill.json"


def with_sweep(file: Path, table: str) -> Path:
    file.write_text(file.read_text().partition("[sweep]")[0] + "[sweep]\nrunner = 'processes'\n" + table)
    return file


def hold(path: Path, seconds: float) -> Callable[[], None]:
    """SQLite has no connection to drop; another process that holds the file is what it can suffer."""

    def work() -> None:
        with sqlite3.connect(path, timeout=30, isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)
            other.execute("COMMIT")

    return work


def break_for(wire: Wire, seconds: float) -> Callable[[], None]:
    def work() -> None:
        wire.cut()
        time.sleep(seconds)
        wire.mend()

    return work


def drilled(
    drill: Drill, count: int, kills: int, wait: tuple[float, float], timeout: float, **how: object
) -> list[Trial]:
    try:
        drill.run(kills, wait, **how)  # type: ignore[arg-type]
        trials = drill.finish(timeout)
    finally:
        drill.stop()
    assert drill.did["kills"] == kills, "the workers ended too soon: the drill tested less than it says"
    assert drill.faults(trials, count) == []
    return trials


@pytest.mark.timeout(900)
def test_a_grid_on_postgresql(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = with_sweep(experiment, GRID)
    with postgres() as url:
        wire = Wire(url)
        monkeypatch.setenv("PGPASSWORD", str(urlsplit(url).password))
        drill = Drill(file, [tmp_path / "one", tmp_path / "two"], wire.url, "quickly")
        drilled(drill, 40, 4, (0.0, 0.3), 600, freezes=1, cut=break_for(wire, 2.0))
        results = drill.results()
        wire.close()
    assert results[0] == results[1]
    undisturbed = Drill(file, [tmp_path / "whole"], "", "quickly")
    undisturbed.start(0)
    undisturbed.finish(300)
    assert undisturbed.results() == results[:1]


@pytest.mark.timeout(900)
def test_a_search_on_sqlite(experiment: Path, tmp_path: Path) -> None:
    file = with_sweep(experiment, SEARCH + "trials = 40\n")
    (tmp_path / "one").mkdir()
    shared = tmp_path / "one" / "optuna.db"
    drill = Drill(file, [tmp_path / "one"], "", "quickly")
    drilled(drill, 40, 4, (0.0, 0.3), 600, freezes=1, cut=hold(shared, 2.0))


def test_control_a_drill_sees_a_trial_counted_twice_and_one_that_is_lost(experiment: Path, tmp_path: Path) -> None:
    few = GRID.replace("[0.002, 0.004, 0.008, 0.016, 0.032]", "[0.002, 0.004]")
    drill = Drill(with_sweep(experiment, few), [tmp_path / "one"], "", "quickly")
    drill.start(0)
    trials = drill.finish(300)
    assert drill.faults(trials, 16) == []
    again = drill.lines("ended")[3]
    with drill.log.open("a") as log:
        log.write(f"ended {again}\n")
    assert drill.faults(trials, 16) == [f"run {again} was counted 2 times"]
    assert drill.faults(trials[1:], 16)[0] == "15 trials instead of 16"


# ---- the long ones ----------------------------------------------------------------------------------------------------


def evidence(storage: str, sweep: str, drill: Drill, trials: list[Trial], seconds: float, **found: object) -> None:
    """Add what a drill showed to docs/results/drill.json."""
    from mue.lab.train.provenance import provenance

    rows = json.loads(EVIDENCE.read_text())["drills"] if EVIDENCE.exists() else []
    rows = [row for row in rows if (row["storage"], row["sweep"]) != (storage, sweep)]
    said = drill.lines("said")
    row = {
        "storage": storage,
        "sweep": sweep,
        "workers": 4,
        **drill.did,
        "lease_seconds": drill.lease,
        "trials": len(trials),
        "done_at_the_last_kill": drill.done,
        "results_refused_as_too_late": sum("too late" in line for line in said),
        "taken_over_while_frozen": sum("taken over by another" in line for line in said),
        "lost": 0,
        "counted_twice": 0,
        "seconds": round(seconds),
        **found,
    }
    about = {"command": "make slow (tests/lab/sweep/test_drill.py)", **provenance()}
    write_json(EVIDENCE, {**about, "drills": sorted([*rows, row], key=lambda r: (r["storage"], r["sweep"]))})


def alone(file: Path, trials: list[Trial], out: Path) -> int:
    """How many trials give the very same loss when they are run again by themselves."""
    spec = sweep_from(read_toml(file), file.parent)
    corpus = open_corpus(spec.source)
    runs = [spec.run_at(t.point, describe_data(spec.source, corpus)) for t in trials]
    again = run_all(runs, Store(out), workers=len(os.sched_getaffinity(0)))
    return sum(again[run.key]["val_loss"] == t.loss for run, t in zip(runs, trials, strict=True))


LONG = "lr = [0.002, 0.004, 0.008, 0.016, 0.032]\nseeds = [0, 1, 2, 3, 4, 5]\nweight_decay = [0.1]\ninit_std = [0.05, 0.1]\n"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("sweep", ["grid", "search"])
@pytest.mark.parametrize("storage", ["postgresql", "sqlite"])
def test_fifty_kills(
    storage: str, sweep: str, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real training: a grid's table is an undisturbed run's, and every trial of a search comes out the same alone."""
    file = with_sweep(experiment, LONG if sweep == "grid" else SEARCH + "trials = 60\n")
    file.write_text(file.read_text().replace("steps = 40", "steps = 300"))
    started = time.monotonic()
    with ExitStack() as opened:
        if storage == "postgresql":
            url = opened.enter_context(postgres())
            wire = Wire(url)
            opened.callback(wire.close)
            monkeypatch.setenv("PGPASSWORD", str(urlsplit(url).password))
            drill = Drill(file, [tmp_path / "one", tmp_path / "two"], wire.url, "really")
            cut = break_for(wire, 10.0)
        else:
            drill = Drill(file, [tmp_path / "one"], "", "really")
            cut = hold(tmp_path / "one" / "optuna.db", 10.0)
        trials = drilled(drill, 60, 50, (2.0, 6.0), 3600, freezes=8, cut=cut, trials=60)
    seconds = time.monotonic() - started
    if sweep == "grid":
        whole = Drill(file, [tmp_path / "whole"], "", "really")
        whole.start(0)
        whole.finish(3600)
        assert [r == whole.results()[0] for r in drill.results()] == [True] * len(drill.folders)
        evidence(storage, sweep, drill, trials, seconds, table_equals_an_undisturbed_run=True)
    else:
        same = alone(file, trials, tmp_path / "alone")
        evidence(storage, sweep, drill, trials, seconds, reproduced_alone=same)
        assert same == len(trials)
