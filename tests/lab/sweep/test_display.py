"""What a sweep shows: the terminal's table, the report while it runs, CSV, and metrics for other viewers."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.sweep.display import SweepDisplay, sparkline, sweep_table
from mue.lab.sweep.metric_sinks import open_sinks, scalars
from mue.lab.sweep.report import COLUMNS, sweep_report
from mue.lab.sweep.sampler import sampler_of
from mue.lab.sweep.spec import SweepSpec, sweep_from
from mue.lab.sweep.state import SweepState, join
from mue.lab.sweep.storage import Database
from mue.lab.sweep.trial import State, Trial
from mue.lab.train.run import Run, Store
from mue.plan.toml import read_toml
from mue.util.files import digest, write_json


def trial(number: int, lr: float, state: State = "COMPLETE", loss: float | None = None, **more: Any) -> Trial:
    point = {"lr": lr, "weight_decay": 0.1, "init_std": 0.05, "seed": 0}
    result = (
        {"val_loss": loss, "status": "x", "key": f"{number:016x}", "step": 7}
        if state in ("COMPLETE", "PRUNED")
        else None
    )
    return Trial(number + 1, number, state, point, result, **more)


def printed(thing: Any) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - ends with the process
    console.print(thing)
    return console.export_text()


def test_the_valley_in_blocks() -> None:
    valley = [trial(i, 2.0**-9 * 2**i, loss=loss) for i, loss in enumerate((2.5, 2.1, 2.0, 2.2, 9.0))]
    line = sparkline(valley, 2.0)
    assert line[2] == "▁" and line[4] == "█" and line[0] > line[1] > line[2] < line[3]
    odd = [
        trial(5, 1.0, loss=None),
        trial(6, 2.0, "RUNNING"),
        trial(7, 4.0, "WAITING"),
        trial(8, 8.0, "PRUNED"),
    ]
    assert sparkline([*valley, *odd], 2.0)[5:] == "×○·╌"
    many = [trial(i, 1.01**i, loss=2.0 + i / 100) for i in range(1000)]
    assert len(sparkline(many, 2.0)) == 32


def test_the_table_says_how_far_it_is() -> None:
    trials = [trial(0, 0.002, loss=2.5), trial(1, 0.004), trial(2, 0.008, "PRUNED"), trial(3, 0.016, "WAITING")]
    running = trial(4, 0.032, "RUNNING", owner="node7:12:abcd", progress={"step": 40, "loss": 2.75}, quiet=33.0)
    text = printed(sweep_table([*trials, running], "sweep", 150, 65))
    for words in (
        "3 of 5 trials",
        "1 diverged",
        "1 stopped early",
        "1 running",
        "1 waiting",
        "1:05",
        "2.5000",
        "0.002",
    ):
        assert words in text
    for words in ("40/150", "2.750", "node7:12", "33 s ago"):
        assert words in text
    assert "running" not in printed(sweep_table(trials, "sweep", 150))


def test_plain_lines_where_there_is_no_terminal(spec: SweepSpec) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    run, result = a_run(spec), {"status": "finished", "val_loss": 2.25}
    with SweepDisplay(console, "sweep", 150) as display:
        display.look([trial(0, 0.002, loss=2.5), trial(1, 0.004, "WAITING")])
        display.ended(run, result, fresh=True)
        display.ended(run, {**result, "status": "stopped", "val_loss": None, "step": 7}, fresh=False)
        display.ended(run, {**result, "val_loss": None}, fresh=False)
    text = console.export_text()
    assert "1 of 2 trials were done before" in text and "lr 0.008" in text and "loss 2.2500" in text
    assert "stopped at step 7, hopeless" in text and "diverged" in text
    assert display.fresh == 1


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


def test_a_sweep_is_read_back_as_it_was_written(spec: SweepSpec, tmp_path: Path) -> None:
    half_done(spec, tmp_path / "out")
    assert SweepState.load(tmp_path / "out").spec == spec


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


@pytest.mark.parametrize("sampler", ["random", "tpe", "valley"])
def test_searches_ask_for_new_points_within_their_ranges(spec: SweepSpec, sampler: str) -> None:
    from dataclasses import replace

    grid = replace(spec.grid, sampler=sampler, trials=12, seeds=(0, 1))
    trials: list[Trial] = []
    while points := sampler_of(grid).propose(trials, 3):
        for point in points:
            loss = 2 + (point["lr"] - 0.008) ** 2 * 100
            trials.append(Trial(len(trials) + 1, len(trials), "COMPLETE", point, {"val_loss": loss}))
    assert 1 <= len(trials) <= 12
    assert len({tuple(t.point.items()) for t in trials}) == len(trials)
    assert all(0.002 * 0.999 <= t.point["lr"] <= 0.032 * 1.001 and t.seed in (0, 1) for t in trials)


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
    with pytest.raises(ValueError, match="pip install wandb"):
        open_sinks(["wandb"], tmp_path)
    with pytest.raises(ValueError, match="tensorboard or wandb, not 'mlflow'"):
        open_sinks(["mlflow"], tmp_path)
    assert scalars(ROWS[0]) == {"loss": 4.9, "load/layer 0": 1.5}


def test_a_machine_that_had_no_part_in_it_reports_from_the_shared_storage(spec: SweepSpec, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    with pytest.raises(ValueError, match="there is no storage"):
        join(tmp_path / "here", url, None)
    assert not (tmp_path / "shared.db").exists()
    Database(url)
    with pytest.raises(ValueError, match="holds no sweep"):
        join(tmp_path / "here", url, None)
    trials = SweepState(tmp_path / "there", spec, spec.identity("0" * 64), url).open_trials()
    trials.ask({"identity": spec.identity("0" * 64), "spec": spec.to_dict()}, sampler_of(spec.grid).points(), only=True)
    join(tmp_path / "here", url, None)
    assert "6 trials" in sweep_report(tmp_path / "here").read_text()
    with pytest.raises(ValueError, match="holds a sweep, which knows its storage"):
        join(tmp_path / "here", url, None)
    second = SweepState(tmp_path / "there", spec, spec.identity("1" * 64), url).open_trials()
    second.ask({"identity": spec.identity("1" * 64), "spec": spec.to_dict()}, [], only=False)
    with pytest.raises(ValueError, match=r"--study:\n  [0-9a-f]{16} .*40 steps of 128 tokens"):
        join(tmp_path / "other", url, None)
    join(tmp_path / "other", url, digest(spec.identity("1" * 64)))
    assert SweepState.load(tmp_path / "other").identity["data"] == "1" * 64
