"""Runs trained in a stack, through the runner: the same files as separate runs; stopped, killed and mixed without loss."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mue
from mue.kernels import build
from mue.lab.data import Corpus
from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.runners.calibrate import Calibration
from mue.lab.runners.listener import RunListener
from mue.lab.runners.open import open_runner
from mue.lab.runners.pool import DEATHS, Pool, WorkerLayout
from mue.lab.runners.run_all import run_all
from mue.lab.runners.runner import Done, FailedError, Message, Progress
from mue.lab.sweep.spec import base_plan
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.session import train

BASE = mue.Dense(32, 32, 1, head_dim=16, sequence=32)
SETTINGS = Settings(eval_every=10, eval_sequences=8, log_every=2)


@pytest.fixture(scope="module")
def source(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return {"source": [str(texts)], "cache": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def corpus(source: dict[str, object]) -> Corpus:
    return open_corpus(source)


def dense_run(source: dict[str, object], corpus: Corpus, lr: float = 0.01, seed: int = 0, steps: int = 24) -> Run:
    tuned = mue.HParams(lr=lr, weight_decay=0.1, init_std=0.1, clip=1.0)
    plan = base_plan(BASE, mue.Training(128, steps), tuned)
    return Run(plan, replace(SETTINGS, seed=seed), describe_data(dict(source), corpus))


def to_the_end(pool: Pool, runs: int) -> tuple[dict[str, dict[str, object]], list[Message]]:
    """Results by key once so many runs have ended, and everything heard."""
    heard: list[Message] = []
    while (done := sum(isinstance(message, Done) for message in heard)) < runs:
        new = pool.wait(240)
        assert new, f"silence after {done} of {runs} runs"
        heard += new
    return {message.run.key: message.result for message in heard if isinstance(message, Done)}, heard


def assert_same_files(one: Store, other: Store, key: str, tolerance: float = 1e-3) -> None:
    """What the rest of the house reads is the same but for rounding and time, and nothing else lies about."""
    names = [sorted(path.name for path in store.folder(key).iterdir()) for store in (one, other)]
    assert names[0] == names[1] == ["config.json", "lock", "metrics.jsonl", "result.json"]
    configs = [(store.folder(key) / "config.json").read_bytes() for store in (one, other)]
    assert configs[0] == configs[1]
    assert len(one.metrics(key)) == len(other.metrics(key)) > 0
    for a, b in zip(one.metrics(key), other.metrics(key), strict=True):
        assert len(a.pop("load", [])) == len(b.pop("load", []))
        assert b == pytest.approx(a, rel=tolerance)
    results = [dict(store.result(key) or {}) for store in (one, other)]
    assert results[0].keys() == results[1].keys()
    for result in results:
        for name in ("seconds", "stacked", "compiled", "threads", "git"):
            result.pop(name)
    losses = [{name: result.pop(name) for name in ("loss", "val_loss")} for result in results]
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert results[1] == results[0]


def test_a_stack_leaves_the_files_of_separate_runs(tmp_path: Path, source: dict[str, object], corpus: Corpus) -> None:
    """Six runs in two processes with stacks of two: other rates, seeds and lengths; one of them diverges; one of another kind."""
    runs = [
        dense_run(source, corpus, lr, seed, steps) for lr, seed, steps in ((0.01, 0, 24), (0.02, 1, 30), (0.005, 2, 12))
    ]
    wild = replace(runs[0].plan.tuned, lr=50.0, init_std=0.5, clip=None)
    runs.append(Run(base_plan(BASE, mue.Training(128, 200), wild), SETTINGS, runs[0].data))
    runs.append(replace(runs[0], settings=replace(SETTINGS, precision="bf16")))
    shape = mue.MoE.parse("4e2a1s", width=32, expert=16, layers=1, head_dim=16, sequence=32)
    training = mue.Training(128, 10)
    moe = mue.transfer(BASE, shape, runs[0].plan.tuned, base_training=training, training=training)
    runs.append(Run(moe, SETTINGS, runs[0].data))
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "stacked")
    for run in runs:
        train(run, whole, corpus)
    pool = Pool(WorkerLayout(2, 1, stack=2), store)
    try:
        for run in runs:
            pool.submit(run)
        results, _ = to_the_end(pool, len(runs))
    finally:
        pool.close()
    assert results[runs[3].key]["status"] == "diverged"
    assert max(int(str(result["stacked"])) for result in results.values()) == 2
    for run in runs:
        assert results[run.key] == store.result(run.key)
        if run is not runs[3]:  # how a run blows up is rounding
            assert_same_files(whole, store, run.key, 0.05 if run.settings.precision == "bf16" else 1e-3)
        with store.locked(run.key):  # and let go of
            pass


def test_one_of_a_stack_is_stopped_and_the_others_go_on(
    tmp_path: Path, source: dict[str, object], corpus: Corpus
) -> None:
    runs = [dense_run(source, corpus, seed=seed, steps=40) for seed in range(3)]
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "stacked")
    for run in runs:
        train(run, whole, corpus)
    pool = Pool(WorkerLayout(1, 1, stack=3), store)
    try:
        for run in runs:
            pool.submit(run)
        pool.stop(runs[1].key)  # at once: a run this short could end before a later stop arrives
        results, _ = to_the_end(pool, 3)
        assert results[runs[1].key]["status"] == "stopped"
        assert results[runs[1].key]["step"] == 1
        assert results[runs[1].key]["val_loss"] is None
        assert store.result(runs[1].key) is None
        assert (store.folder(runs[1].key) / "checkpoint.safetensors").exists()
    finally:
        pool.close()
    train(runs[1], store, corpus)  # alone, from where the stack left it
    for run in runs:
        assert_same_files(whole, store, run.key)


def test_a_killed_stack_goes_on_from_its_checkpoints(tmp_path: Path, source: dict[str, object], corpus: Corpus) -> None:
    """kill -9 of the worker: its runs go on in a new one, rows of metrics are neither lost nor doubled."""
    runs = [dense_run(source, corpus, seed=seed, steps=40) for seed in range(2)]
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "stacked")
    for run in runs:
        train(run, whole, corpus)
    pool = Pool(WorkerLayout(1, 1, stack=2), store, checkpoint_seconds=0.0)
    try:
        for run in runs:
            pool.submit(run)
        ahead: list[str] = []
        while not ahead:
            ahead = [m.key for m in pool.wait(240) if isinstance(m, Progress) and m.step >= 20]
        os.kill(pool.workers[0].pid, signal.SIGKILL)
        results, heard = to_the_end(pool, 2)
    finally:
        pool.close()
    assert min(m.step for m in heard if isinstance(m, Progress) and m.key == ahead[0]) >= 18  # it did not begin again
    for run in runs:
        assert results[run.key]["status"] == "finished"
        assert_same_files(whole, store, run.key)


def test_a_run_that_kills_its_process_again_and_again_is_given_up(
    tmp_path: Path, source: dict[str, object], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    (broken / "numpy").mkdir(parents=True)
    (broken / "numpy" / "__init__.py").write_text("import os; os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    run = dense_run(source, corpus)
    pool = Pool(WorkerLayout(1, 1), Store(tmp_path))
    try:
        pool.submit(run)
        with pytest.raises(FailedError, match=rf"{run.key} died {DEATHS} times at step 0 \(exit code 7\)"):
            to_the_end(pool, 1)
        assert pool.wait(1.0) == []
    finally:
        pool.close()


def test_the_layout_is_measured_once_and_said(
    tmp_path: Path, source: dict[str, object], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mue.lab.runners.calibrate.MEASURED_SECONDS", 0.2)
    run, store = dense_run(source, corpus), Store(tmp_path)
    first = open_runner("auto", store, example=run, runs=8)
    assert "measured in" in first.why
    assert "stacks of 4" in first.why
    assert "steps/s" in first.why
    (kept,) = (tmp_path / "cache" / "runner").glob("*.json")
    rows = json.loads(kept.read_text())["measured"]
    assert all(math.isfinite(row["rate"]) and row["rate"] > 0 for row in rows)
    assert not (tmp_path / "runs").exists()  # nothing of it in the user's folder
    again = open_runner("auto", store, example=run, runs=8)
    assert "measured before" in again.why
    assert again.slots == first.slots
    stacked = open_runner("stacked", store, example=run, runs=8)
    assert stacked.slots == 4
    assert open_runner("stacked", store, workers=6).slots == 6
    assert open_runner("processes", store, workers=3).slots == 3
    with pytest.raises(ValueError, match="give an example"):
        open_runner("auto", store)
    for runner in (first, again, stacked):
        runner.close()


def test_a_measurement_is_of_the_kernel_it_was_made_with(
    source: dict[str, object], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kernels = dense_run(source, corpus), [None, Path("one.so"), Path("two.so")]
    paths = []
    for kernel in [*kernels, *kernels]:
        monkeypatch.setattr(build, "find", lambda kernel=kernel: kernel)
        paths.append(Calibration(run, 2, ()).path)
    assert paths[:3] == paths[3:] and len(set(paths)) == 3


class Ended(RunListener):
    def __init__(self) -> None:
        self.runs: list[tuple[str, bool]] = []

    def ended(self, run: Run, result: dict[str, Any], *, fresh: bool) -> None:
        self.runs.append((run.key, fresh))


def test_run_all_stacked(tmp_path: Path, source: dict[str, object], corpus: Corpus) -> None:
    runs = [dense_run(source, corpus, seed=seed, steps=4) for seed in (0, 1, 0)]
    store, heard = Store(tmp_path), Ended()
    train(runs[1], store, corpus)
    results = run_all(runs, store, workers=2, kind="stacked", listener=heard)
    assert heard.runs == [(runs[1].key, False), (runs[0].key, True)]
    assert {key: result["status"] for key, result in results.items()} == dict.fromkeys(dict(heard.runs), "finished")
