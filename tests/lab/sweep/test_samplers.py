"""Samplers: each in a file of its own, also from outside; the file's keys, the storage and the search ask it alone."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import EXPERIMENT
from mue.lab.data.spec import open_corpus
from mue.lab.runners.runner import Message
from mue.lab.sweep import sweep as sweep_module
from mue.lab.sweep.report import sweep_report
from mue.lab.sweep.sampler import SAMPLERS, Grid, Sampler, sampler_of
from mue.lab.sweep.spec import SweepSpec, sweep_from
from mue.lab.sweep.state import SweepState
from mue.lab.sweep.sweep import run_sweep
from mue.lab.sweep.trial import OPEN, Point, Trial
from mue.plan.toml import read_toml
from support.scripted_runner import Scripted, done


@pytest.fixture
def halving() -> Iterator[None]:
    """A sampler as somebody else would write it: from the largest learning rate down by ``factor``, one at a time."""

    @SAMPLERS.register("halving")
    class Halving(Sampler):
        keys = ("factor",)
        trials = 3

        def propose(self, trials: Sequence[Trial], n: int) -> list[Point]:
            if any(t.state in OPEN for t in trials) or len(trials) == self.grid.trials:
                return []
            lr = self.grid.lr[-1] / self.grid.options.get("factor", 2.0) ** len(trials)
            return [{"lr": lr, "weight_decay": self.grid.weight_decay[0], "init_std": 0.05, "seed": 7}]

        def why_done(self, trials: Sequence[Trial]) -> str | None:
            return f"halved {len(trials)} times"

    yield
    del SAMPLERS._entries["halving"]


def spec_of(experiment: Path, **sweep: Any) -> SweepSpec:
    data = read_toml(experiment)
    data["sweep"] = {"lr": [0.002, 0.032], "weight_decay": [0.1], "init_std": [0.05], **sweep}
    return sweep_from(data, experiment.parent)


@pytest.mark.usefixtures("halving")
def test_a_sampler_from_outside_is_one_class(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(runner: Scripted) -> list[Message]:
        return [done(run) for run in runner.flying.values()]

    monkeypatch.setattr(sweep_module, "open_runner", lambda *_, **__: Scripted(script))
    spec = spec_of(experiment, sampler="halving", factor=4.0)
    result = run_sweep(spec, tmp_path, open_corpus(spec.source))
    assert [t.point["lr"] for t in result.trials] == [0.032, 0.008, 0.002]
    assert SweepState.load(tmp_path).spec == spec and spec.grid.options == {"factor": 4.0}
    assert "halved 3 times." in sweep_report(tmp_path).read_text()
    with pytest.raises(ValueError, match=r'factor goes with sampler = "halving"'):
        spec_of(experiment, factor=4.0)
    with pytest.raises(ValueError, match=r"trials goes with sampler = valley, random, tpe.* or halving"):
        spec_of(experiment, trials=4)


def test_without_it_the_file_and_the_storage_are_not_understood(experiment: Path, halving: None) -> None:
    stored = spec_of(experiment, sampler="halving").to_dict()
    assert SweepSpec.from_dict(stored).to_dict() == stored
    entry = SAMPLERS._entries.pop("halving")
    try:
        with pytest.raises(ValueError, match="unknown sampler 'halving'"):
            SweepSpec.from_dict(stored)
        with pytest.raises(ValueError, match=r"must be one of grid, valley, random, tpe.*, got 'halving'"):
            spec_of(experiment, sampler="halving")
    finally:
        SAMPLERS._entries["halving"] = entry


@pytest.mark.parametrize("sampler", ["grid", "valley", "random", "tpe"])
def test_a_stored_grid_has_the_keys_it_always_had(sampler: str) -> None:
    data = tomllib.loads(EXPERIMENT)
    data["sweep"] |= {"sampler": sampler} | ({"trials": 9} if sampler != "grid" else {})
    grid = sweep_from(data, Path("/somewhere")).grid
    stored = grid.to_dict()
    assert list(stored) == [
        *("lr", "weight_decay", "init_std", "seeds", "sampler", "trials"),
        *("precision", "extend", "stop_early", "runner"),
    ]
    assert (stored["precision"], stored["extend"]) == (0.25, False)
    assert Grid.from_dict({**stored, "lr": list(stored["lr"])}) == grid
    with pytest.raises(TypeError, match="later"):
        Grid.from_dict({**stored, "later": 1})


def test_a_grid_asks_for_everything_at_once_and_a_search_for_nothing() -> None:
    grid = Grid((0.1, 0.2, 0.4), (0.0, 0.1), (0.02,), seeds=(0, 1))
    points = sampler_of(grid).points()
    assert len({tuple(p.items()) for p in points}) == 12 and points[0]["lr"] == 0.2
    assert sampler_of(grid).propose([], 5) == [] and sampler_of(grid).why_done([]) is None
    for name in ("valley", "random", "tpe"):
        sampler = sampler_of(Grid((0.1, 0.2, 0.4), (0.0, 0.1), (0.02,), sampler=name, trials=5))
        assert sampler.points() == [] and len(sampler.propose([], 2)) == 2


@pytest.mark.parametrize("sampler", ["random", "tpe", "valley"])
def test_searches_ask_for_new_points_within_their_ranges(experiment: Path, sampler: str) -> None:
    listed = sweep_from(read_toml(experiment), experiment.parent).grid
    grid = replace(listed, sampler=sampler, trials=12, seeds=(0, 1))
    trials: list[Trial] = []
    while points := sampler_of(grid).propose(trials, 3):
        for point in points:
            loss = 2 + (point["lr"] - 0.008) ** 2 * 100
            trials.append(Trial(len(trials) + 1, len(trials), "COMPLETE", point, {"val_loss": loss}))
    assert 1 <= len(trials) <= 12
    assert len({tuple(t.point.items()) for t in trials}) == len(trials)
    assert all(0.002 * 0.999 <= t.point["lr"] <= 0.032 * 1.001 and t.seed in (0, 1) for t in trials)
