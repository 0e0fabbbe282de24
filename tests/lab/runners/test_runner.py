"""Runners: whatever trains a run leaves the same files; runs are given up and taken up again; nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mue
from mue.lab.data import Corpus
from mue.lab.data.spec import data_source, describe_data, open_corpus
from mue.lab.runners.open import open_runner
from mue.lab.runners.pool import Pool
from mue.lab.runners.runner import Busy, Done, Runner
from mue.lab.sweep.spec import base_plan
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.session import train
from mue.plan.toml import read_toml

BASE = mue.Dense(32, 32, 1, head_dim=16, sequence=32)
SETTINGS = Settings(eval_every=10, eval_sequences=8, log_every=5)


@pytest.fixture
def source(experiment: Path) -> dict[str, object]:
    return data_source(read_toml(experiment), experiment.parent)


@pytest.fixture
def corpus(source: dict[str, object]) -> Corpus:
    return open_corpus(source)


def dense_run(source: dict[str, object], corpus: Corpus, lr: float = 0.01, steps: int = 30) -> Run:
    tuned = mue.HParams(lr=lr, weight_decay=0.1, init_std=0.1)
    return Run(base_plan(BASE, mue.Training(128, steps), tuned), SETTINGS, describe_data(dict(source), corpus))


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


def wait_for(true: Callable[[], bool], patience: float = 240) -> None:
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker process ends when its stdin does")
def test_a_worker_process_ends_with_its_parent_even_when_it_is_stopped() -> None:
    start = "import subprocess as s, sys, time; print(s.Popen([sys.executable, '-m', 'mue.lab.runners.worker'], stdin=s.PIPE).pid)"
    command = [sys.executable, "-u", "-c", f"{start}; time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path("/proc") / parent.stdout.readline().strip()
        wait_for(lambda: "libtorch" in (child / "maps").read_text())  # it serves
        os.kill(int(child.name), signal.SIGSTOP)
        wait_for(lambda: (child / "stat").read_text().rpartition(")")[2].split()[0] == "T")
        parent.kill()
    wait_for(lambda: not child.exists() or (child / "stat").read_text().rpartition(")")[2].split()[0] == "Z")


def test_an_unknown_runner_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads"):
        open_runner("threads", Store(tmp_path))
