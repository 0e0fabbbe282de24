"""Runners: whatever trains a run leaves the same files; runs are given up and taken up again; nothing is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from mue.lab.data import Corpus
from mue.lab.runners.open import open_runner
from mue.lab.runners.pool import DEATHS, Pool, WorkerLayout
from mue.lab.runners.runner import Busy, Done, FailedError, Runner
from mue.lab.train.run import Run, Store
from mue.lab.train.session import train
from support.dense_runs import dense_run


def until(runner: Runner, kind: type, patience: float = 240) -> list[object]:
    """Everything heard up to and with the first message of a kind."""
    heard: list[object] = []
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        heard += runner.wait(0.2)
        if any(isinstance(message, kind) for message in heard):
            return heard
    raise AssertionError(f"no {kind.__name__} within {patience} s: {heard}")


def same_run(a: Store, b: Store, key: str) -> bool:
    return (a.folder(key) / "metrics.jsonl").read_bytes() == (b.folder(key) / "metrics.jsonl").read_bytes()


def test_a_stopped_run_is_given_up_and_can_be_finished(
    tmp_path: Path, source: dict[str, object], corpus: Corpus
) -> None:
    run, whole, store = dense_run(source, corpus, steps=40), Store(tmp_path / "whole"), Store(tmp_path / "store")
    runner = open_runner("processes", store, workers=1)
    assert isinstance(runner, Pool)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(runner.layout.threads)  # as many as the worker's: they decide how sums are rounded
        train(run, whole, corpus)
        torch.set_num_threads(before)
        assert runner.slots == 1
        assert runner.wait(5.0) == []  # nothing is in flight: it does not wait
        runner.submit(run)
        runner.stop(run.key)  # at once: a run this short could end before a later stop arrives
        (done,) = (m for m in until(runner, Done) if isinstance(m, Done))
        assert done.run.key == run.key
        assert done.result["status"] == "stopped"
        assert done.result["val_loss"] is None
        assert done.result["step"] == 1
        assert store.result(run.key) is None
        runner.submit(run)
        (done,) = (m for m in until(runner, Done) if isinstance(m, Done))
        assert done.result == store.result(run.key)
        runner.submit(run)  # finished before: at once
        assert runner.wait(5.0) == [Done(run, done.result)]
    finally:
        torch.set_num_threads(before)
        runner.close()
    assert done.result["status"] == "finished"
    assert same_run(whole, store, run.key)


def test_a_run_that_waits_is_stopped_before_it_begins(
    tmp_path: Path, source: dict[str, object], corpus: Corpus
) -> None:
    first, second = (dense_run(source, corpus, lr, steps=100_000) for lr in (0.01, 0.02))
    runner = open_runner("processes", Store(tmp_path), workers=1)
    try:
        runner.submit(first)
        runner.submit(second)
        runner.stop(second.key)
        (done,) = (m for m in until(runner, Done) if isinstance(m, Done))
        assert done.run.key == second.key
        assert done.result["step"] == 0
    finally:
        runner.close()


def test_what_ends_a_run_before_it_begins(tmp_path: Path, source: dict[str, object], corpus: Corpus) -> None:
    """Another process trains it; the text has changed. The worker serves on."""
    run, store = dense_run(source, corpus), Store(tmp_path)
    runner = open_runner("processes", store, workers=1)
    try:
        with store.locked(run.key):
            runner.submit(run)
            assert until(runner, Busy) == [Busy(run)]
        runner.submit(Run(run.plan, run.settings, {**run.data, "hash": "0" * 64}))
        with pytest.raises(ValueError, match="the text changed"):
            until(runner, Done)
        assert runner.wait(1.0) == []  # nothing is in flight
        runner.submit(run)
        assert isinstance(until(runner, Done)[-1], Done)
    finally:
        runner.close()


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
            until(pool, Done)
        assert pool.wait(1.0) == []
    finally:
        pool.close()
