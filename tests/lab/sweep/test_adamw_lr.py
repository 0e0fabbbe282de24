"""A sweep that looks for AdamW's rate beside Muon's: both rates of a hybrid, and nothing of it where it is not asked for."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from mue.lab.data.spec import open_corpus
from mue.lab.runners.runner import Done, Message
from mue.lab.sweep import sweep as sweep_module
from mue.lab.sweep.report import sweep_report
from mue.lab.sweep.result import Cell
from mue.lab.sweep.sampler import sampler_of
from mue.lab.sweep.spec import SweepSpec, sweep_from
from mue.lab.sweep.sweep import run_sweep
from mue.lab.sweep.trial import Trial
from mue.lab.sweep.tuned import tuned_of
from mue.lab.train.run import Run
from mue.lab.valley.cell import CellValues
from mue.plan.toml import read_toml
from support.scripted_runner import Scripted, done

LRS, RATES = tuple(2.0**x for x in (-9, -8, -7, -6, -5)), (0.002, 0.008, 0.032)


@pytest.fixture
def spec(experiment: Path) -> SweepSpec:
    tables = read_toml(experiment)
    tables["tuned"] = {**tables.get("tuned", {}), "optimizer": "muon", "update_scale": "keller"}
    tables["sweep"] |= {"adamw_lr": list(RATES)}
    found = sweep_from(tables, experiment.parent)
    return replace(found, grid=replace(found.grid, lr=LRS, weight_decay=(0.1,), init_std=(0.02,), seeds=(0,)))


def test_both_rates_are_found(spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Run] = []

    def ended(run: Run) -> Done:
        trained.append(run)
        roles = run.plan.roles
        lr, beside = roles["ffn_up"].values.lr, roles["embedding"].values.lr
        assert lr is not None and beside is not None
        loss = 2 + 0.1 * (math.log2(lr) + 7) ** 2 + 0.1 * abs(math.log2(beside / 0.008))
        return Done(run, {**done(run).result, "val_loss": loss})

    def script(runner: Scripted) -> list[Message]:
        return [ended(run) for run in runner.flying.values()]

    monkeypatch.setattr(sweep_module, "open_runner", lambda *_, **__: Scripted(script))
    result = run_sweep(spec, tmp_path, open_corpus(spec.source))
    assert len({run.key for run in trained}) == len(LRS) * len(RATES)
    assert result.tuned.adamw_lr == 0.008 and result.tuned.lr == pytest.approx(2**-7, rel=0.05)
    assert result.tuned.optimizer == "muon" and tuned_of(tmp_path).tuned == result.tuned
    assert result.verdict.startswith("weight decay 0.1, init std 0.02, AdamW lr 0.008: minimum at lr")
    told = json.loads((tmp_path / "result.json").read_text())
    assert [Cell.from_dict(cell).values for cell in told["cells"]] == [cell.values for cell in result.cells]
    page = sweep_report(tmp_path).read_text()
    assert "Weight decay, init std and AdamW lr: the fitted minima" in page
    with (tmp_path / "trials.csv").open() as file:
        assert {float(row["adamw_lr"]) for row in csv.DictReader(file)} == set(RATES)


@pytest.mark.parametrize("sampler", ["valley", "tpe", "random"])
def test_every_sampler_has_the_axis(spec: SweepSpec, sampler: str) -> None:
    grid = replace(spec.grid, sampler=sampler, trials=12)
    trials: list[Trial] = []
    for number in range(8):
        (point,) = sampler_of(grid).propose(trials, 1)
        loss = 2 + 0.05 * (math.log2(point["lr"]) + 7) ** 2 + 0.1 * abs(math.log2(point["adamw_lr"] / 0.008))
        trials.append(Trial(number, number, "COMPLETE", point, {"val_loss": loss}))
    beside = {CellValues.of(t.point).adamw_lr[0] for t in trials}
    assert RATES[0] <= min(beside) < max(beside) <= RATES[-1]
    assert sampler != "valley" or beside <= set(RATES)


def test_it_goes_with_muon(experiment: Path) -> None:
    tables = read_toml(experiment)
    plain = sweep_from(tables, experiment.parent)
    assert "adamw_lr" not in plain.grid.to_dict()
    tables["sweep"] |= {"adamw_lr": [0.002, 0.004]}
    with pytest.raises(ValueError, match=r"adamw_lr goes with optimizer = .muon., not with .adamw."):
        sweep_from(tables, experiment.parent)
    tables["tuned"] = {**tables.get("tuned", {}), "optimizer": "muon", "adamw_lr": 0.01}
    with pytest.raises(ValueError, match=r"\[tuned\] adamw_lr is what the sweep looks for"):
        sweep_from(tables, experiment.parent)
