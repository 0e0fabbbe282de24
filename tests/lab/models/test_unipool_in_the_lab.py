"""UniPool in whole runs: exact resume, recomputed blocks, stacked variants, an ordinary plan file, the checks."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mue
from mue.checks import Coordinates
from mue.lab.data import Corpus, load_corpus
from mue.lab.data.spec import describe_data
from mue.lab.models.language import LanguageModel
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.session import TrainingSession, train
from mue.lab.train.stacked_session import StackedSession
from mue.lab.train.step import objective
from mue.shapes import Transformer
from support.command_line import in_process, refused
from support.small_run import Stop, stop_at

BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
SHAPE = mue.MoE.parse("16e2a2p", width=32, expert=16, layers=4, head_dim=16, sequence=32, router="unipool")
TUNED = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1)
STEPS = 10


@pytest.fixture(scope="module")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(texts, cache=tmp_path_factory.mktemp("cache"))


def run(corpus: Corpus, seed: int = 0) -> Run:
    training = mue.Training(128, STEPS)
    plan = mue.transfer(BASE, SHAPE, TUNED.replace(z=1e-3), base_training=training, training=training)
    settings = Settings(seed=seed, eval_every=5, eval_sequences=8, log_every=1)
    return Run(plan, settings, describe_data({"source": []}, corpus))


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, corpus: Corpus) -> None:
    asked, whole, broken = run(corpus), Store(tmp_path / "whole"), Store(tmp_path / "broken")
    train(asked, whole, corpus, keep_weights=True)
    with pytest.raises(Stop):
        train(asked, broken, corpus, progress=stop_at(4), checkpoint_seconds=0)
    train(asked, broken, corpus, keep_weights=True)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (whole.folder(asked.key) / name).read_bytes() == (broken.folder(asked.key) / name).read_bytes(), name
    rows = [json.loads(line) for line in (whole.folder(asked.key) / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] and len(rows[-1]["load"]) == 4


def test_without_what_the_layers_chose_the_next_step_is_another(tmp_path: Path, corpus: Corpus) -> None:
    """Negative control of the test above: the pool's share is what the checkpoint holds beside weights and moments."""
    asked, losses = run(corpus), []
    for forget in (False, True):
        (tmp_path / str(forget)).mkdir()
        with TrainingSession(asked, tmp_path / str(forget), corpus) as session:
            for _ in range(3):
                session.train_step()
            if forget:
                for name, value in session.model.named_buffers():
                    if "share" in name:
                        value.zero_()
            for _ in range(2):
                session.train_step()
            losses.append(session.loss)
    assert losses[0] != losses[1]


def test_stacked_runs_are_themselves(tmp_path: Path, corpus: Corpus) -> None:
    """float64, to 1e-10, of two seeds, one of which joins later: pools, their load and σ are each run's own."""
    runs = [run(corpus, seed) for seed in (0, 1)]
    rows: dict[str, list[list[dict[str, object]]]] = {}
    for way in ("alone", "stacked"):
        with ExitStack() as opened:
            sessions = []
            for i, each in enumerate(runs):
                folder = tmp_path / way / str(i)
                folder.mkdir(parents=True)
                sessions.append(opened.enter_context(TrainingSession(each, folder, corpus)))
                sessions[-1].model.double()
            if way == "alone":
                for session in sessions:
                    for _ in range(4):
                        session.train_step()
            else:
                stack = StackedSession(sessions[0], 2)
                stack.put(0, sessions[0])
                stack.step()
                stack.put(1, sessions[1])
                for step in range(4):
                    stack.step()
                    if step == 2:
                        stack.drop(0)
        rows[way] = [
            [json.loads(line) for line in (s.folder / "metrics.jsonl").read_text().splitlines()] for s in sessions
        ]
    for alone, stacked in zip(rows["alone"], rows["stacked"], strict=True):
        assert len(alone) == len(stacked) == 4
        for a, b in zip(alone, stacked, strict=True):
            assert a.pop("load") == b.pop("load") and a.pop("routers", None) == b.pop("routers", None)
            assert b == pytest.approx(a, rel=1e-10)
    assert rows["alone"][0][0]["loss"] != rows["alone"][1][0]["loss"]  # the control: the seeds differ


def test_a_recomputed_block_counts_no_more_than_others() -> None:
    """Gradients and the pool's share are those of a model whose second block alone is recomputed."""
    torch.manual_seed(2)
    tokens, found = torch.randint(256, (2, 2, 32)), []
    for recomputed in (False, True):
        torch.manual_seed(3)
        model = LanguageModel(SHAPE).double()
        if recomputed:
            block = model.blocks[1]
            plain = block.forward
            block.forward = lambda x, given=None, plain=plain: checkpoint(plain, x, given, use_reentrant=False)  # type: ignore[method-assign]
        for _ in range(2):
            model.zero_grad()
            objective(model(*tokens), {}).backward()  # type: ignore[no-untyped-call]
            model.end_step_(0.0)
        found.append((model.state_dict(), [p.grad for p in model.parameters()]))
    (state, gradients), (again, anew) = found
    for name, value in state.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
    for one, other in zip(gradients, anew, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)
    assert state["common.unipool.share_0"].sum().item() == pytest.approx(1)


def test_the_checks_pass_and_see_what_is_wrong() -> None:
    plan = mue.transfer(BASE, SHAPE, TUNED)
    model = LanguageModel(plan.target, plan.multipliers)
    plan.init_(model, seed=5)
    tokens = torch.randint(256, (2, 4, 32), generator=torch.Generator().manual_seed(0)).unbind(0)
    groups = plan.param_groups(model)
    report = mue.check(model, plan, tokens, torch.optim.AdamW(groups))
    assert not report.warnings and not report.unmeasured, report
    passed = {"coverage", "init", "groups", "multipliers", "gates", "moved"}
    assert {f.check for f in report.findings if f.status == "pass"} >= passed
    assert sum(p.numel() for g in groups for p in g["params"]) == plan.target.parameters
    sigma = {g["lr"] for g in groups for p in g["params"] if p is model.blocks[1].moe.router.scale}  # type: ignore[union-attr]
    assert sigma == {plan.roles["norm"].values.lr}
    assert mue.check(model, plan, only=("gates",)).ok
    for layer in (0, 3):
        router = model.blocks[layer].moe.router  # type: ignore[union-attr]
        router.route_scale *= 1.5
        failed = mue.check(model, plan, tokens, raises=False).failures
        assert {f.check for f in failed} >= {"multipliers"} and f"pools.{layer // 2}.down" in failed[0].where
        router.route_scale /= 1.5
    with torch.no_grad():
        model.blocks[2].moe.router.scale.fill_(0.5)  # type: ignore[union-attr]
    assert "blocks.2.moe.router.scale" in mue.check(model, plan, raises=False, only=("init",)).failures[0].where


@pytest.mark.parametrize("router", ["unipool", "dtop-p"])
def test_the_exported_file_has_a_group_for_every_parameter(router: str) -> None:
    """The routers' scalars as well, each with the rate of a gain."""
    plan = mue.fold.fold(mue.transfer(BASE, replace(SHAPE, router=router), TUNED))
    model = LanguageModel(plan.target, plan.multipliers)
    made: dict[str, Any] = {}
    exec(plan.export("torch"), made)
    theirs = {id(p): (g["lr"], g["weight_decay"]) for g in made["param_groups"](model) for p in g["params"]}
    ours = {id(p): (g["lr"], g["weight_decay"]) for g in plan.param_groups(model) for p in g["params"]}
    assert theirs.keys() == ours.keys() == {id(p) for p in model.parameters()}
    for one, setting in theirs.items():
        assert setting == pytest.approx(ours[one])
    scalars = [p for name, p in model.named_parameters() if name.endswith(("router.scale", "router.theta"))]
    assert len(scalars) == 4 and {theirs[id(p)] for p in scalars} == {(plan.roles["norm"].values.lr, 0.0)}
    made["init_"](model)
    assert all(p.item() == 1 for p in scalars)


def sized(notation: str, width: int = 64, expert: int = 32) -> mue.MoE:
    return mue.MoE.parse(
        notation, width=width, expert=expert, layers=2, head_dim=32, sequence=32, vocab=64, router="unipool"
    )


AXES = {
    "width": [sized("16e2a"), sized("16e2a", 128, 64), sized("16e2a", 256, 128)],
    "experts": [sized("16e2a"), sized("32e2a"), sized("64e2a")],
    "active": [sized("32e1a"), sized("32e2a"), sized("32e4a")],
    "granularity": [sized("16e2a"), sized("32e4a", expert=16), sized("64e8a", expert=8)],
}


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
def test_updates_are_as_large_along_every_axis(axis: str) -> None:
    """And along the width they are not with plain AdamW's values (negative control)."""
    base = mue.Dense(64, 64, 2, head_dim=32, sequence=32, vocab=64)

    def check(rule: str) -> Coordinates:
        def plan(shape: Transformer) -> mue.Plan:
            return mue.transfer(base, shape, mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02), rule=rule)

        def build(shape: Transformer) -> LanguageModel:
            return LanguageModel(shape, plan(shape).multipliers)

        return mue.coordinate_check(build, plan, {axis: AXES[axis]}, batches, steps=6, raises=False)

    found = check("complete-mue")
    assert found.ok, found
    assert axis != "width" or {s.module for s in check("standard").failures} >= {"router", "feed-forward branch"}


def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token follows from the last one, up to three choices."""
    g = torch.Generator().manual_seed(step + 100)
    rows = [torch.randint(0, 64, (8, 1), generator=g)]
    for _ in range(32):
        rows.append((rows[-1] * 5 + torch.randint(0, 3, (8, 1), generator=g)) % 64)
    tokens = torch.cat(rows, 1)
    return tokens[:, :-1], tokens[:, 1:]


PLAN = """
[base]
width = 32
ffn = 32
layers = 2
head_dim = 16
sequence = 32
training = {batch = 128, steps = 20}
[tuned]
lr = 0.01
weight_decay = 0.1
init_std = 0.1
[target]
moe = "16e2a"
width = 32
expert = 16
layers = 4
head_dim = 16
sequence = 32
training = {batch = 128, steps = 20}
"""


def test_an_ordinary_plan_file_trains(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.toml"
    data = f'[data]\nsource = ["{texts}"]\n'
    router = '[target.router]\nname = "unipool"\nnormalise_scores = true\nlosses = {pool_balance = 0.02}\n'
    file.write_text(PLAN + router + data)
    code, out, err = in_process(capsys, monkeypatch, "plan", file)
    assert code == 0 and "16e2a1p d32 L4" in out and "normalise_scores true" in out and "read each pool" in out, err
    code, _, err = in_process(capsys, monkeypatch, "train", file, "-o", tmp_path / "out", "--device", "cpu")
    assert code == 0, err
    (folder,) = (tmp_path / "out").glob("runs/*")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20 and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    result = json.loads((folder / "result.json").read_text())
    assert result["name"] == "16e2a1p d32 L4" and result["parameters"] == replace(SHAPE, pools=1).parameters
    for wrong, words in (
        (router.replace("normalise_scores", "normalize_scores"), ("normalise_scores", "normalize_scores")),
        (router.replace("0.02", "-1"), ("pool_balance", "at least 0")),
    ):
        file.write_text(PLAN + wrong + data)
        refused(in_process(capsys, monkeypatch, "train", file, "-o", tmp_path / "none"), *words)
    file.write_text(PLAN.replace("16e2a", "16e2a8p") + router + data)
    refused(in_process(capsys, monkeypatch, "train", file, "-o", tmp_path / "none"), "no layer would read some of them")
    assert not (tmp_path / "none").exists()
