"""Checkpoints survive a full disk, and one that is damaged or of something else is refused by name."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch

import mue
from mue.lab.data import Corpus
from mue.lab.models.language import LanguageModel
from mue.lab.train import checkpoint
from mue.lab.train.run import Store
from mue.lab.train.session import train
from support.small_run import STEPS, TUNED, Stop, moe_run, stop_at


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
