"""Training: exact resume, divergence as a result, one process at a time, losses that act."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

import mue
from mue.lab.data import Corpus
from mue.lab.train.run import BusyError, Settings, Store
from mue.lab.train.session import train
from support.small_run import STEPS, TUNED, Stop, moe_run, stop_at

MUON = TUNED.replace(optimizer="muon", lr=0.02, adamw_lr=0.01, momentum=0.95)


@pytest.mark.parametrize(
    ("stop", "balance", "tuned"),
    [*itertools.product((2, 10, 22), ("bias", "loss"), (TUNED,)), (2, "bias", MUON), (10, "bias", MUON)],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, corpus: Corpus, stop: int, balance: str, tuned: mue.HParams
) -> None:
    settings = Settings(eval_every=10, eval_sequences=8, log_every=2, balance=balance)
    run = moe_run(corpus, settings, tuned=tuned)
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    train(run, whole, corpus, keep_weights=True)
    with pytest.raises(Stop):
        train(run, broken, corpus, progress=stop_at(stop), checkpoint_seconds=0)
    assert (broken.folder(run.key) / "checkpoint.safetensors").exists()
    steps: list[int] = []
    train(run, broken, corpus, progress=lambda step, loss: steps.append(step), keep_weights=True)
    assert steps[0] == stop  # the step after the checkpoint (made one step before the stop), not the first one
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (whole.folder(run.key) / name).read_bytes() == (broken.folder(run.key) / name).read_bytes(), name


def test_control_another_seed_gives_other_metrics(tmp_path: Path, corpus: Corpus) -> None:
    store = Store(tmp_path)
    runs = [moe_run(corpus, Settings(eval_every=10, eval_sequences=8, log_every=2, seed=s)) for s in (0, 1)]
    results = [train(run, store, corpus) for run in runs]
    assert runs[0].key != runs[1].key
    assert results[0]["val_loss"] != results[1]["val_loss"]


def test_a_finished_run_is_read_not_run(tmp_path: Path, corpus: Corpus) -> None:
    run, store = moe_run(corpus), Store(tmp_path)
    first = train(run, store, corpus)

    def never(step: int, loss: float) -> None:
        raise AssertionError("it ran again")

    assert train(run, store, corpus, progress=never) == first
    assert not (store.folder(run.key) / "checkpoint.safetensors").exists()
    rows = store.metrics(run.key)
    assert rows[-1]["step"] == STEPS
    assert rows[-1]["val_loss"] == first["val_loss"]
    assert len(rows[-1]["load"]) == 2
    assert len(rows[-1]["load"][0]) == 8


def test_metrics_can_be_read_while_a_run_grows(tmp_path: Path, corpus: Corpus) -> None:
    run, store, seen = moe_run(corpus), Store(tmp_path), list[tuple[int, int]]()
    train(run, store, corpus, progress=lambda step, loss: seen.append((step, store.metrics(run.key)[-1]["step"])))
    assert len(seen) > 3 and all(told == written for told, written in seen)


def test_training_learns(tmp_path: Path, corpus: Corpus) -> None:
    result = train(moe_run(corpus, steps=80), Store(tmp_path), corpus)
    assert result["val_loss"] < math.log(256) - 1.5


def test_a_diverged_run_is_a_result(tmp_path: Path, corpus: Corpus) -> None:
    tuned = mue.HParams(lr=30.0, weight_decay=0.0, init_std=0.5)
    result = train(moe_run(corpus, tuned=tuned, steps=200), Store(tmp_path), corpus)
    assert result["status"] == "diverged"
    assert result["val_loss"] is None
    assert result["step"] < 200


def test_two_processes_cannot_train_one_run(tmp_path: Path, corpus: Corpus) -> None:
    run, store = moe_run(corpus), Store(tmp_path)
    with store.locked(run.key), pytest.raises(BusyError, match=run.key):
        train(run, store, corpus)


def test_the_z_loss_acts_in_every_balance_mode(tmp_path: Path, corpus: Corpus) -> None:
    with_z, without = (moe_run(corpus, tuned=TUNED.replace(z=z)) for z in (1.0, 0.0))
    store = Store(tmp_path)
    assert train(with_z, store, corpus)["val_loss"] != train(without, store, corpus)["val_loss"]


def test_a_run_with_muon_learns_and_is_keyed_by_what_it_trains_with(tmp_path: Path, corpus: Corpus) -> None:
    result = train(moe_run(corpus, tuned=MUON), Store(tmp_path), corpus)
    assert result["status"] == "finished" and result["val_loss"] < math.log(256) - 1.5
    keys = {moe_run(corpus, tuned=MUON.replace(**change)).key for change in ({}, {"momentum": 0.9}, {"adamw_lr": 0.02})}
    keys.add(moe_run(corpus, tuned=MUON.replace(update_scale="keller")).key)
    assert len(keys) == 4
    with pytest.raises(ValueError, match="the lab trains with adamw and muon, the plan is for lion"):
        moe_run(corpus, tuned=TUNED.replace(optimizer="lion"))
