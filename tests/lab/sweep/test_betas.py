"""A sweep that looks for Adam's betas as well: an axis like the others, and nothing of it where it is not asked for."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.report import plots
from mue.lab.runners.runner import Done, Message
from mue.lab.sweep import sweep as sweep_module
from mue.lab.sweep.display import SweepDisplay, sweep_table
from mue.lab.sweep.report import sweep_report
from mue.lab.sweep.result import Cell, SweepResult
from mue.lab.sweep.sampler import sampler_of
from mue.lab.sweep.spec import SweepSpec, sweep_from
from mue.lab.sweep.state import SweepState
from mue.lab.sweep.sweep import run_sweep
from mue.lab.sweep.trial import Trial, name_of
from mue.lab.sweep.tuned import tuned_of
from mue.lab.train.run import Run
from mue.lab.valley.cell import CellValues
from mue.plan.toml import read_toml
from support.scripted_runner import Heard, Scripted, done

PAIRS = ((0.9, 0.95), (0.8, 0.9), (0.6, 0.8))
LRS = tuple(2.0**x for x in (-9, -8, -7, -6, -5))


@pytest.fixture
def plain(experiment: Path) -> SweepSpec:
    """Without betas: five learning rates, one cell."""
    found = sweep_from(read_toml(experiment), experiment.parent)
    return replace(found, grid=replace(found.grid, lr=LRS, weight_decay=(0.1,), init_std=(0.02,), seeds=(0,)))


@pytest.fixture
def spec(plain: SweepSpec) -> SweepSpec:
    return replace(plain, grid=replace(plain.grid, betas=PAIRS))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """What a runner trained; the loss is lowest at betas (0.8, 0.9) and lr 2^-7."""
    found: list[Run] = []

    def ended(run: Run) -> Done:
        found.append(run)
        tuned = run.plan.tuned
        depth = {0.9: 2.2, 0.8: 2.0, 0.6: 2.1}[tuned.betas[0]]
        return Done(run, {**done(run).result, "val_loss": depth + 0.1 * (math.log2(tuned.lr) + 7) ** 2})

    def script(runner: Scripted) -> list[Message]:
        return [ended(run) for run in runner.flying.values()]

    monkeypatch.setattr(sweep_module, "open_runner", lambda *_, **__: Scripted(script))
    return found


def swept(spec: SweepSpec, out: Path, **more: Any) -> SweepResult:
    return run_sweep(spec, out, open_corpus(spec.source), **more)


def test_the_deepest_cell_gives_the_betas(spec: SweepSpec, tmp_path: Path, trained: list[Run]) -> None:
    result = swept(spec, tmp_path)
    assert len(trained) == 15 and len({run.key for run in trained}) == 15
    assert {run.plan.betas for run in trained} == set(PAIRS)  # what is trained, not what is written
    assert result.tuned.betas == (0.8, 0.9) and result.tuned.lr == pytest.approx(2**-7, rel=0.05)
    assert result.verdict.startswith("weight decay 0.1, init std 0.02, betas 0.8/0.9: minimum at lr")
    assert [cell.values.betas for cell in result.cells] == sorted(PAIRS)
    assert tuned_of(tmp_path).tuned == result.tuned
    told = json.loads((tmp_path / "result.json").read_text())
    assert [tuple(cell["betas"]) for cell in told["cells"]] == sorted(PAIRS)
    assert [Cell.from_dict(cell).values for cell in told["cells"]] == [cell.values for cell in result.cells]


def test_tables_and_pages_show_them(
    spec: SweepSpec, tmp_path: Path, trained: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = replace(spec, grid=replace(spec.grid, weight_decay=(0.1, 0.2), init_std=(0.02, 0.04)))
    result = swept(wide, tmp_path)
    drawn: list[str] = []
    figure = plots.sweep_figure

    def noting(cells: list[dict[str, Any]], *more: Any) -> Any:
        drawn.extend(cell["label"] for cell in cells)
        return figure(cells, *more)

    monkeypatch.setattr(plots, "sweep_figure", noting)
    page = sweep_report(tmp_path).read_text()
    assert "Weight decay, init std and betas: the fitted minima" in page and "at betas 0.8/0.9" in page
    assert "0.6/0.8" in page and "wd 0.1, std 0.02, β 0.8/0.9" in drawn
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(float(row["beta1"]), float(row["beta2"])) for row in rows} == set(PAIRS)
    from rich.console import Console

    console = Console(width=120, record=True, file=(tmp_path / "screen").open("w"))
    console.print(sweep_table(result.trials, "sweep", 150))
    with SweepDisplay(console, "sweep", 150) as display:
        display.look(result.trials)
        display.ended(trained[0], done(trained[0]).result, fresh=True)
    text = console.export_text()
    assert "betas" in text and "0.8/0.9" in text and "β1 0.9 β2 0.95" in text


def test_a_sweep_without_them_is_what_it_was(plain: SweepSpec, tmp_path: Path, trained: list[Run]) -> None:
    """Its points, files and tables know nothing of betas, and it says that it did not look."""
    result = swept(plain, tmp_path)
    assert all(set(t.point) == {"lr", "weight_decay", "init_std", "seed"} for t in result.trials)
    told = json.loads((tmp_path / "result.json").read_text())
    assert "betas" not in told["cells"][0] and "betas" not in told["asked"]
    sweep_report(tmp_path)
    assert (tmp_path / "trials.csv").read_text().splitlines()[0].endswith("worker,run")
    data = describe_data(plain.source, open_corpus(plain.source))
    point = sampler_of(plain.grid).points()[0]
    # the same values make the same run, looked for or given
    assert plain.run_at({**point, "beta1": 0.9, "beta2": 0.95}, data).key == plain.run_at(point, data).key
    assert plain.run_at({**point, "beta1": 0.8, "beta2": 0.95}, data).key != plain.run_at(point, data).key
    steps = plain.training.steps
    assert any(f"% of {steps:,}" in words for words in result.advice) == (0.01 * steps < 10)
    assert replace(result, spec=replace(plain, grid=replace(plain.grid, betas=PAIRS))).advice == []


def test_another_axis_is_another_experiment(
    plain: SweepSpec, spec: SweepSpec, tmp_path: Path, trained: list[Run]
) -> None:
    """Betas cannot join a sweep that was tuned at one pair; within theirs they come and go as any value does."""
    swept(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"another experiment \(tuned differ\)"):
        swept(spec, tmp_path / "plain")
    swept(replace(spec, grid=replace(spec.grid, betas=PAIRS[:1])), tmp_path / "own")
    del trained[:]
    result = swept(spec, tmp_path / "own", listener=Heard())
    assert {run.plan.betas for run in trained} == set(PAIRS[1:]) and len(result.cells) == 3
    assert SweepState.load(tmp_path / "own").spec == spec
    assert swept(spec, tmp_path / "own", resume=True).tuned == result.tuned


@pytest.mark.parametrize("sampler", ["valley", "random", "tpe"])
def test_searches_choose_among_the_pairs(spec: SweepSpec, sampler: str) -> None:
    grid = replace(spec.grid, sampler=sampler, trials=24, seeds=(0, 1))
    trials: list[Trial] = []
    while points := sampler_of(grid).propose(trials, 3):
        for point in points:
            cell = CellValues.of(point)
            loss = {0.9: 2.2, 0.8: 2.0, 0.6: 2.1}[cell.betas[0]] + 0.05 * (math.log2(point["lr"]) + 7) ** 2
            trials.append(Trial(len(trials) + 1, len(trials), "COMPLETE", point, {"val_loss": loss}))
    assert {CellValues.of(t.point).betas for t in trials} == set(PAIRS)
    assert len({name_of(t.point) for t in trials}) == len(trials) > 10
    if sampler == "valley":  # the deepest cell gets the most
        runs = [CellValues.of(t.point).betas for t in trials]
        assert max(PAIRS, key=runs.count) == (0.8, 0.9)
    narrower = replace(grid, betas=PAIRS[:2], trials=30)  # trials of a pair that is not asked for any more do no harm
    assert all(CellValues.of(p).betas in PAIRS[:2] for p in sampler_of(narrower).propose(trials, 2))


def test_early_stopping_compares_within_a_cell(spec: SweepSpec) -> None:
    one, two = ({"lr": 0.01, "weight_decay": 0.1, "init_std": 0.02, "beta1": b, "beta2": 0.95} for b in (0.9, 0.8))
    assert CellValues.of(one) != CellValues.of(two) and CellValues.of(one).point == {
        k: v for k, v in one.items() if k != "lr"
    }
