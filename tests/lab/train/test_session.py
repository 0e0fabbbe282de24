"""Training: exact resume, checkpoints that survive, divergence as a result, keys of runs."""

from __future__ import annotations

import json
import math
import resource
import signal
from pathlib import Path

import pytest
import torch

import mue
from mue.lab.data import Corpus
from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.models.language import LanguageModel
from mue.lab.sweep.spec import sweep_from
from mue.lab.train import checkpoint
from mue.lab.train.run import BusyError, Run, Settings, Store
from mue.lab.train.schedule import lr_factor
from mue.lab.train.session import train
from mue.plan.toml import read_toml

BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
TARGET = mue.MoE.parse("8e2a1s", width=64, expert=32, layers=2, head_dim=16, sequence=32)
TUNED = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1, clip=1.0, z=1e-3)
SETTINGS = Settings(eval_every=10, eval_sequences=8, log_every=2)
STEPS = 24


@pytest.fixture
def corpus(experiment: Path) -> Corpus:
    return open_corpus(sweep_from(read_toml(experiment), experiment.parent).source)


def moe_run(corpus: Corpus, settings: Settings = SETTINGS, steps: int = STEPS, tuned: mue.HParams = TUNED) -> Run:
    training = mue.Training(128, steps)
    tuned = tuned.replace(balance=0.01 if settings.balance == "loss" else 0.0)
    plan = mue.transfer(BASE, TARGET, tuned, base_training=training, training=training)
    return Run(plan, settings, describe_data({"source": []}, corpus))


class Stop(Exception):  # noqa: N818
    pass


def stop_at(step: int):
    def progress(at: int, loss: float) -> None:
        if at >= step:
            raise Stop

    return progress


@pytest.mark.parametrize("balance", ["bias", "loss"])
@pytest.mark.parametrize("stop", [2, 10, 22])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, corpus: Corpus, balance: str, stop: int) -> None:
    run = moe_run(corpus, Settings(eval_every=10, eval_sequences=8, log_every=2, balance=balance))
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


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    run, other, store = moe_run(corpus), moe_run(corpus, steps=STEPS + 2), Store(tmp_path)
    with pytest.raises(Stop):
        train(other, store, corpus, progress=stop_at(10), checkpoint_seconds=0)
    moved = store.folder(run.key)
    moved.mkdir(parents=True)
    (store.folder(other.key) / "checkpoint.safetensors").rename(moved / "checkpoint.safetensors")
    with pytest.raises(ValueError, match=f"not of run {run.key}"):
        train(run, store, corpus)


def test_a_damaged_checkpoint_is_named(tmp_path: Path, corpus: Corpus) -> None:
    run, store = moe_run(corpus), Store(tmp_path)
    folder = store.folder(run.key)
    folder.mkdir(parents=True)
    (folder / "checkpoint.safetensors").write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match="damaged"):
        train(run, store, corpus)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, corpus: Corpus) -> None:
    """Files may not grow past a limit, as on a full disk: the error is clear, and the old checkpoint still loads."""
    run, store = moe_run(corpus), Store(tmp_path)
    with pytest.raises(Stop):
        train(run, store, corpus, progress=stop_at(10), checkpoint_seconds=0)
    path = store.folder(run.key) / "checkpoint.safetensors"
    good = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, before[1]))
        with pytest.raises(OSError, match="last good one is kept"):
            train(run, store, corpus, checkpoint_seconds=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == good
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []
    assert train(run, store, corpus)["status"] == "finished"


def test_runs_are_keyed_by_effective_values(corpus: Corpus) -> None:
    """Rules that agree share runs; what changes a number changes the key; what does not, does not."""
    data = describe_data({"source": []}, corpus)
    training = mue.Training(128, 10)

    def key(rule: str = "complete-mue", target: mue.Dense | mue.MoE = BASE, **changes: float) -> str:
        plan = mue.transfer(
            BASE, target, TUNED.replace(**changes), base_training=training, training=training, rule=rule
        )
        return Run(plan, SETTINGS, data).key

    assert key("standard") == key("complete-mue") == key("complete-mue-paper")  # at the base every rule is the identity
    assert key("standard", TARGET) != key("complete-mue", TARGET)
    assert key(lr=0.02) != key()
    assert key(bias_speed=0.5) == key()  # a dense model has no balance bias
    assert key(target=TARGET, bias_speed=0.5) != key(target=TARGET)


def test_run_round_trip(corpus: Corpus) -> None:
    run = moe_run(corpus)
    again = Run.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again.key == run.key
    assert again.plan == run.plan


def test_a_batch_must_hold_whole_sequences(corpus: Corpus) -> None:
    training = mue.Training(100, 10)
    plan = mue.transfer(BASE, TARGET, TUNED, base_training=training, training=training)
    with pytest.raises(ValueError, match="whole number of sequences"):
        Run(plan, SETTINGS, describe_data({"source": []}, corpus))


def test_coefficients_that_nothing_reads_are_refused(corpus: Corpus) -> None:
    """A balance coefficient without its loss, the loss without its coefficient, another optimizer than the lab's."""
    data, training = describe_data({"source": []}, corpus), mue.Training(128, 10)

    def run(settings: Settings, **changes: object) -> Run:
        plan = mue.transfer(BASE, TARGET, TUNED.replace(**changes), base_training=training, training=training)
        return Run(plan, settings, data)

    with pytest.raises(ValueError, match="turns on"):
        run(SETTINGS, balance=0.01)
    with pytest.raises(ValueError, match="coefficient"):
        run(Settings(balance="loss"))
    with pytest.raises(ValueError, match="AdamW"):
        run(SETTINGS, optimizer="lion")


def test_the_z_loss_acts_in_every_balance_mode(tmp_path: Path, corpus: Corpus) -> None:
    with_z, without = (moe_run(corpus, tuned=TUNED.replace(z=z)) for z in (1.0, 0.0))
    store = Store(tmp_path)
    assert train(with_z, store, corpus)["val_loss"] != train(without, store, corpus)["val_loss"]


def test_a_checkpoint_without_some_weights_is_damaged(tmp_path: Path, corpus: Corpus) -> None:
    from safetensors.torch import load_file, save_file

    run, store = moe_run(corpus), Store(tmp_path)
    with pytest.raises(Stop):
        train(run, store, corpus, progress=stop_at(10), checkpoint_seconds=0)
    path = store.folder(run.key) / "checkpoint.safetensors"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors.pop("model/head.weight")
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match="damaged"):
        train(run, store, corpus)


@pytest.mark.parametrize("steps", [10, 100, 1000])
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_schedule_is_a_fraction_of_the_run(schedule: str, steps: int) -> None:
    tuned = TUNED.replace(warmup=0.1, floor=0.1)
    settings = Settings(schedule=schedule, decay=0.2)
    factors = [lr_factor(step, steps, tuned, settings) for step in range(steps)]
    assert max(factors) == pytest.approx(1.0, abs=0.03)
    assert all(0 < f <= 1 for f in factors)
    assert factors[round(0.1 * steps) - 1] == 1.0
    assert factors[-1] < 0.5
    assert factors[-1] >= 0.1
    middle = factors[round(0.6 * steps)]
    assert middle == 1.0 if schedule == "wsd" else 0.2 < middle < 0.8


def test_checkpoint_holds_tied_weights_and_buffers_once(tmp_path: Path) -> None:
    shape = mue.MoE.parse("4e2a", width=32, expert=16, layers=1, head_dim=16, sequence=16, tied=True)
    plan = mue.transfer(mue.Dense(32, 32, 1, head_dim=16, tied=True), shape, TUNED)
    models = [LanguageModel(shape, plan.multipliers) for _ in range(2)]
    optimizers = []
    for seed, model in enumerate(models):
        plan.init_(model, seed)
        optimizer = torch.optim.AdamW(plan.param_groups(model), fused=True)
        model(torch.arange(16)[None], torch.arange(16)[None]).loss.backward()
        optimizer.step()
        model.end_step_(0.01)
        optimizers.append(optimizer)
    checkpoint.save(tmp_path / "c", models[0], optimizers[0], {"run": "r", "plan": "p"})
    with torch.no_grad():
        checkpoint.load(tmp_path / "c", models[1], optimizers[1], run="r", plan="p")
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert set(optimizers[0].state[p]) == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizers[0].state[p].items():
            assert torch.equal(value, optimizers[1].state[q][key])
