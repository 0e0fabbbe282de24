"""Runs trained in a stack, through the runner: the same files as separate runs; stopped, killed and mixed without loss."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

import mue
from mue.lab.data import Corpus
from mue.lab.runners.pool import Pool, WorkerLayout
from mue.lab.runners.runner import Done, Message, Progress
from mue.lab.sweep.spec import base_plan
from mue.lab.train.run import Run, Store
from mue.lab.train.session import train
from support.dense_runs import BASE, SETTINGS, dense_run


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
    experts = ["routers.json"] if "load" in one.metrics(key)[-1] else []
    assert names[0] == names[1] == ["config.json", "lock", "metrics.jsonl", "result.json", *experts]
    configs = [(store.folder(key) / "config.json").read_bytes() for store in (one, other)]
    assert configs[0] == configs[1]
    assert len(one.metrics(key)) == len(other.metrics(key)) > 0
    for a, b in zip(one.metrics(key), other.metrics(key), strict=True):
        for name in ("load", "routers"):
            assert len(a.pop(name, [])) == len(b.pop(name, []))
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
