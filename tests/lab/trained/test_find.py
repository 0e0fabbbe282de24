"""mue.lab.trained.find: whatever a trained run is named by, and what is said where its weights are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mue.lab.data.spec import open_corpus
from mue.lab.train.run import Store, read_run
from mue.lab.train.session import train
from mue.lab.trained.find import find, untrained
from support.small_run import Stop, stop_at
from support.trained import moe_run_of_bytes


def test_a_run_has_many_names(moe_run: Path) -> None:
    store, key = moe_run.parent.parent, moe_run.name
    plan = read_run(moe_run).plan.hash
    for path in (moe_run, store, store / key, store / key[:5], store / plan[:6], moe_run / "model.safetensors"):
        found = find(path)
        assert found.folder == moe_run and not found.under_way, path
    assert found.name == f"8e2a1s d32 L2, run {key}"


@pytest.mark.parametrize("which", ["moe_run", "dense_run"])
def test_the_model_has_the_weights_of_the_file(which: str, request: pytest.FixtureRequest) -> None:
    """Tied ones too, whose head is in no file; those of the untrained model are others (the control)."""
    folder = request.getfixturevalue(which)
    model, stored = find(folder).model(), load_file(folder / "model.safetensors")
    own = model.state_dict()
    assert set(own) - set(stored) == ({"head.weight"} if which == "dense_run" else set())
    for name, tensor in stored.items():
        assert torch.equal(own[name], tensor), name
    assert not model.training
    before = untrained(read_run(folder)).state_dict()
    assert not torch.equal(before["embedding.weight"], stored["embedding.weight"])


def test_a_run_under_way_is_its_checkpoint(moe_run: Path, domains: Path, tmp_path: Path) -> None:
    run = read_run(moe_run)
    corpus = open_corpus(run.data["source"])
    with pytest.raises(Stop):
        train(run, Store(tmp_path), corpus, checkpoint_seconds=0, progress=stop_at(10))
    found = find(tmp_path)
    assert found.name.endswith(", under way") and found.weights.name == "checkpoint.safetensors"
    middle, end = (f.model().state_dict()["blocks.0.moe.experts_up"] for f in (found, find(moe_run)))
    assert middle.shape == end.shape and not torch.equal(middle, end)


def test_without_weights_it_is_said_how_to_get_them(moe_run: Path, domains: Path, tmp_path: Path) -> None:
    bare = moe_run_of_bytes(domains, tmp_path / "a", keep=False, steps=2)
    for path in (bare, tmp_path / "a", tmp_path / "a" / bare.name[:4]):
        with pytest.raises(ValueError, match=rf"--keep-weights only; mue train \S+{bare.name} -o OUT"):
            find(path)
    other = tmp_path / "a" / "runs" / "other"
    shutil.copytree(moe_run, other)
    assert find(tmp_path / "a").folder == other  # the one that keeps them
    shutil.copytree(moe_run, other.with_name("another"))
    with pytest.raises(ValueError, match=r"2 runs in .* keep their weights, name one: .*/another \(8e2a1s d32 L2\)"):
        find(tmp_path / "a")


def test_a_run_that_is_planned_otherwise_now_is_refused(moe_run: Path, tmp_path: Path) -> None:
    """Its file was changed, or it is of another version: its weights are not those of what would be built. What is left of it can be read."""
    other = tmp_path / "runs" / moe_run.name
    shutil.copytree(moe_run, other)
    config = json.loads((other / "config.json").read_text())
    config["plan"]["tuned"]["lr"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    changed = read_run(other)
    for path in (other, tmp_path, other / "model.safetensors"):
        with pytest.raises(ValueError, match=rf"trained as run {moe_run.name}, and what .* is run {changed.key} now"):
            find(path)
    assert Store(tmp_path).run(moe_run.name) == changed


def test_what_is_no_run(moe_run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path, words in {
        tmp_path: "holds no run",
        tmp_path / "nothing": "does not exist",
        tmp_path / "config.json": "no checkpoint of a run",
        tmp_path / "model.safetensors": "no checkpoint of a run",
    }.items():
        with pytest.raises(ValueError, match=words):
            find(path)
    broken = tmp_path / "broken"
    shutil.copytree(moe_run, broken)
    (broken / "model.safetensors").write_bytes(b"too short")
    with pytest.raises(ValueError, match="is damaged"):
        find(broken).model()
