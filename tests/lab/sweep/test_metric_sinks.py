"""Metrics for other viewers: each row once, also over sessions; a package that is missing is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.sweep.metric_sinks import open_sinks, scalars
from mue.lab.sweep.sampler import sampler_of
from mue.lab.sweep.spec import SweepSpec, sweep_from
from mue.lab.train.run import Run, Store
from mue.plan.toml import read_toml


@pytest.fixture
def spec(experiment: Path) -> SweepSpec:
    return sweep_from(read_toml(experiment), experiment.parent)


def rows_of(run: Run, store: Store, rows: list[dict[str, Any]], tail: str = "") -> None:
    path = store.folder(run.key) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


ROWS = [{"step": s, "loss": 5.0 - s / 10, "load": [[0.5, 0.25, 0.25]]} for s in (1, 5, 10)]


def a_run(spec: SweepSpec) -> Run:
    return spec.run_at(sampler_of(spec.grid).points()[0], describe_data(spec.source, open_corpus(spec.source)))


def test_tensorboard_gets_each_row_once(spec: SweepSpec, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = a_run(spec)
    for _ in range(2):  # the second session writes the run from its first row again, in the place of the first's
        (sink,) = open_sinks(["tensorboard"], tmp_path)
        rows_of(run, Store(tmp_path), ROWS[:2], tail='{"step": 10, "lo')
        sink.follow(run)
        rows_of(run, Store(tmp_path), ROWS)
        sink.follow(run)
        sink.__exit__(None, None, None)
    events = EventAccumulator(str(tmp_path / "tensorboard" / run.key))
    events.Reload()
    assert [(e.step, round(e.value, 5)) for e in events.Scalars("loss")] == [(1, 4.9), (5, 4.5), (10, 4.0)]


def test_wandb_gets_each_row_once(spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    made = SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("finished"))
    asked: dict[str, Any] = {}
    fake = SimpleNamespace(init=lambda **how: asked.update(how) or made)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = a_run(spec)
    (sink,) = open_sinks(["wandb"], tmp_path)
    for end in (2, 3):
        rows_of(run, Store(tmp_path), ROWS[:end])
        sink.follow(run)
    sink.__exit__(None, None, None)
    assert logged == [*((row["step"], scalars(row)) for row in ROWS), "finished"]
    assert asked["id"] == run.key and asked["config"]["lr"] == run.plan.tuned.lr


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'mue\[wandb\] @ git\+<repository>'"):
        open_sinks(["wandb"], tmp_path)
    with pytest.raises(ValueError, match="tensorboard or wandb, not 'mlflow'"):
        open_sinks(["mlflow"], tmp_path)
    assert scalars(ROWS[0]) == {"loss": 4.9, "load/layer 0": 1.5}
    seen = {"m1": 1.0, "dead": 2, "entropy": None, "share": [0.5, 0.5]}
    assert scalars({"step": 1, "routers": [seen]}) == {"routers/m1/layer 0": 1.0, "routers/dead/layer 0": 2}
