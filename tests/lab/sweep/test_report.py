"""The report of a sweep and its table of trials, while it runs."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from mue.lab.data import Corpus, load_corpus
from mue.lab.data.spec import open_corpus
from mue.lab.sweep.report import COLUMNS, experts_sections, sweep_report
from mue.lab.sweep.sampler import sampler_of
from mue.lab.sweep.spec import SweepSpec, sweep_from
from mue.lab.sweep.state import SweepState
from mue.lab.sweep.trial import Trial
from mue.lab.train.run import Store
from mue.lab.train.session import train
from mue.plan.toml import read_toml
from mue.util.files import write_json
from support.small_run import SETTINGS, moe_run


@pytest.fixture
def spec(experiment: Path) -> SweepSpec:
    return sweep_from(read_toml(experiment), experiment.parent)


def half_done(spec: SweepSpec, folder: Path) -> None:
    """A sweep's folder with two trials ended, one under way, three waiting: nothing was trained."""
    own = spec.identity(open_corpus(spec.source).hash)
    write_json(folder / "sweep.json", {"identity": own, "spec": spec.to_dict(), "storage": None})
    trials = SweepState(folder, spec, own, None).open_trials()
    trials.add(sampler_of(spec.grid).points())
    for loss in (2.5, None):
        claimed = trials.claim("node:1:a")
        assert claimed is not None
        trials.finish("node:1:a", claimed.id, {"val_loss": loss, "status": "x", "key": "k", "seconds": 2.0})
    trials.claim("node:1:a")


def test_report_and_csv_while_it_runs(spec: SweepSpec, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    half_done(spec, folder)
    page = sweep_report(folder, csv=tmp_path / "mine.csv").read_text()
    assert "2 of 6 trials" in page and "so far" in page and "node:1" in page
    assert (tmp_path / "mine.csv").read_text() == (folder / "trials.csv").read_text()
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["state"] for row in rows] == ["complete", "diverged", "running", "waiting", "waiting", "waiting"]
    assert [row["val_loss"] for row in rows[:2]] == ["2.5", ""]
    assert [float(row["lr"]) for row in rows] == 2 * [0.008, 0.002, 0.032]  # from the middle outwards
    assert rows[0]["worker"] == "node:1:a"


@pytest.fixture
def corpus(texts: Path, tmp_path: Path) -> Corpus:
    return load_corpus(texts, cache=tmp_path / "cache")


def test_a_sweep_of_a_shape_with_experts_shows_the_routers_of_its_lowest_run(corpus: Corpus, tmp_path: Path) -> None:
    runs = [moe_run(corpus, replace(SETTINGS, seed=seed), steps=4) for seed in (0, 1)]
    results = [train(run, Store(tmp_path), corpus) for run in runs]
    point = {"lr": 0.01, "weight_decay": 0.1, "init_std": 0.1, "seed": 0.0}
    trials = [Trial(i, i, "COMPLETE", point, result) for i, result in enumerate(results)]
    best = min(trials, key=lambda trial: trial.loss)
    away = Trial(2, 2, "COMPLETE", point, {"val_loss": 0.1, "key": "trained elsewhere"})
    first, *rest = experts_sections(tmp_path, [*trials, away])
    assert first.title.endswith(f"(trial {best.number}, the lowest of those here)") and len(first.rows) == 5
    assert [section.id for section in rest][-1] == "routers-of-trials" and len({s.id for s in rest}) == len(rest)
    assert rest[-1].rows[0][0] == f"trial {best.number}" and len(rest[-1].rows) == 2
    [none] = experts_sections(tmp_path, [away])
    assert "lie with the workers" in none.texts[0]["text"]
    assert "No run has ended" in experts_sections(tmp_path, [])[0].texts[0]["text"]
