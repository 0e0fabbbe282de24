"""Routers that choose by mass, by draw and by groups, in whole runs from an ordinary plan file: training, exact resume, recomputed
blocks, stacked variants, every backend, the checks."""

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
from mue.lab.data import Corpus, load_corpus
from mue.lab.data.spec import describe_data
from mue.lab.models.language import LanguageModel
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.session import TrainingSession, train
from mue.lab.train.stacked_session import StackedSession
from mue.moe import MoELayer
from mue.moe.routers.base import BaseRouter, RouterOptions
from mue.plan.toml import plan_inputs
from mue.plan.transfer import plan_of
from support.precision import close
from support.small_run import Stop, stop_at

ROUTERS: dict[str, Any] = {
    "top-p": "top-p",
    "top-p renormalised": {"name": "top-p", "p": 0.3, "renormalise": True},
    "dtop-p": "dtop-p",
    "dtop-p by layer": {"name": "dtop-p", "control": "layer"},
    "elastic": "elastic",
    "dynamoe": "dynamoe",
    "group-limited": "group-limited",
}
STEPS = 20


@pytest.fixture(scope="module")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(texts, cache=tmp_path_factory.mktemp("cache"))


def plan(router: str, **target: Any) -> mue.Plan:
    """Of a plan file that says no more than any other does."""
    small = {"layers": 2, "head_dim": 16, "sequence": 32, "training": {"batch": 128, "steps": STEPS}}
    file = {
        "base": {"width": 32, "ffn": 32, **small},
        "tuned": {"lr": 0.01, "weight_decay": 0.1, "init_std": 0.1},
        "target": {"width": 32, "moe": "16e3a", "expert": 16, "router": ROUTERS[router], **small, **target},
    }
    return mue.Plan.of(plan_of(plan_inputs(file)))


def run(corpus: Corpus, router: str, **settings: Any) -> Run:
    given = Settings(**{"eval_every": 10, "eval_sequences": 8, "log_every": 1, **settings})
    return Run(plan(router), given, describe_data({"source": []}, corpus))


@pytest.mark.parametrize("router", ROUTERS)
def test_it_trains_and_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, corpus: Corpus, router: str) -> None:
    asked = run(corpus, router)
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    result = train(asked, whole, corpus, keep_weights=True)
    with pytest.raises(Stop):
        train(asked, broken, corpus, progress=stop_at(8), checkpoint_seconds=0)
    train(asked, broken, corpus, keep_weights=True)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (whole.folder(asked.key) / name).read_bytes() == (broken.folder(asked.key) / name).read_bytes(), name
    assert result["status"] == "finished"
    rows = [json.loads(line) for line in (whole.folder(asked.key) / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["loss"] for row in rows[-3:]) < sum(row["loss"] for row in rows[:3]) - 0.3


@pytest.mark.parametrize("router", ["dtop-p", "dtop-p by layer", "elastic", "group-limited"])
def test_what_a_router_keeps_is_in_the_state_that_is_saved(tmp_path: Path, corpus: Corpus, router: str) -> None:
    """Every buffer that has moved; put back to its start, the next step is another one (the control of the test above)."""
    with TrainingSession(run(corpus, router), tmp_path, corpus) as session:
        start = {name: value.clone() for name, value in session.model.named_buffers()}
        for _ in range(4):
            session.train_step()
        moved = {name for name, value in session.model.named_buffers() if not torch.equal(value, start[name])}
        last = {name.rsplit(".", 1)[-1] for name in moved}
        p = {"p", "error_sum"}
        assert last == {"dtop-p": p, "dtop-p by layer": p, "elastic": {"step", "balance_bias"}}.get(
            router, {"balance_bias"}
        )
        assert sum(name.endswith(".p") for name in moved) == {"dtop-p": 1, "dtop-p by layer": 2}.get(router, 0)
        state = session.model.state_dict()
        assert moved <= set(state)
        tokens = torch.randint(256, (2, 32))
        before = session.model(tokens, tokens).routings[0].expert_P
        for name in moved:
            state[name].copy_(torch.full_like(start[name], 0.02) if name.endswith(".p") else start[name])
        if router != "group-limited":  # a bias of four small steps may choose the same
            assert not torch.equal(before, session.model(tokens, tokens).routings[0].expert_P)


@pytest.mark.parametrize("router", ["top-p", "dtop-p", "elastic", "group-limited"])
def test_stacked_runs_are_themselves(tmp_path: Path, corpus: Corpus, router: str) -> None:
    """float64, to 1e-10, of two seeds, whose tokens use differing numbers of experts."""
    rows: dict[str, list[list[dict[str, Any]]]] = {}
    for way in ("alone", "stacked"):
        with ExitStack() as opened:
            sessions = []
            for seed in (0, 1):
                folder = tmp_path / way / str(seed)
                folder.mkdir(parents=True)
                session = TrainingSession(run(corpus, router, seed=seed), folder, corpus)
                session.model.double()
                sessions.append(opened.enter_context(session))
            if way == "alone":
                for session in sessions:
                    for _ in range(3):
                        session.train_step()
            else:
                stack = StackedSession(sessions[0], 2)
                for place, session in enumerate(sessions):
                    stack.put(place, session)
                for _ in range(3):
                    stack.step()
        rows[way] = [
            [json.loads(line) for line in (s.folder / "metrics.jsonl").read_text().splitlines()] for s in sessions
        ]
    for alone, stacked in zip(rows["alone"], rows["stacked"], strict=True):
        for a, b in zip(alone, stacked, strict=True):
            assert a["load"] == b["load"] and b["loss"] == pytest.approx(a["loss"], rel=1e-10)
    assert rows["alone"][0][0]["loss"] != rows["alone"][1][0]["loss"]  # the control: the seeds differ


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("router", ROUTERS)
def test_every_backend_computes_the_same(router: str) -> None:
    torch.manual_seed(0)
    x, found = torch.randn(2, 32, 32, requires_grad=True), []
    for backend in ("native", "portable", "reference"):
        torch.manual_seed(1)
        layer = MoELayer.from_block(plan(router).target.blocks[0], 32, RouterOptions(route_scale=2.0), backend=backend)
        y, _ = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for ours in found[:2]:
        for mine, exact in zip(ours, found[2], strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_recomputed_block_chooses_what_it_chose(router: str) -> None:
    """Gradients are the same, and what the router has counted moves it by the same step."""
    found = []
    for recomputed in (False, True):
        torch.manual_seed(2)
        model, x = LanguageModel(plan(router).target, seed=4), torch.randn(2, 32, 32, requires_grad=True)
        block = model.blocks[0]
        y = checkpoint(block, x, use_reentrant=False)[0] if recomputed else block(x)[0]
        gradients = torch.autograd.grad(y.square().sum(), [x, *block.moe.parameters()])
        model.end_step_(1e-3)
        found.append((gradients, dict(model.named_buffers())))
    operations = 2 * (7 * 32 + 2 * 32 + 64)  # products over the width, attention, sums over the tokens
    for once, anew in zip(found[0][0], found[1][0], strict=True):
        assert close(anew, once, operations=operations)
        assert not once.any() or not close(1.01 * anew, once, operations=operations)  # negative control
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


@pytest.mark.parametrize("router", ROUTERS)
def test_the_checks_pass_and_see_what_is_wrong(router: str) -> None:
    planned = plan(router, width=64)
    model = LanguageModel(planned.target, planned.multipliers, seed=5)
    planned.init_(model)
    tokens = torch.randint(256, (4, 32))
    groups = planned.param_groups(model)
    report = mue.check(model, planned, (tokens, tokens), torch.optim.AdamW(groups))
    passed = {f.check for f in report.findings if f.status == "pass"}
    assert passed >= {"coverage", "init", "groups", "multipliers", "gates", "moved"}
    assert sum(p.numel() for g in groups for p in g["params"]) == planned.target.parameters
    assert {f.status for f in mue.check(model, planned, only=("gates",)).findings} == {"pass"}
    model.blocks[1].moe.router.route_scale *= 2  # R wrong in one layer
    failed = {f.check for f in mue.check(model, planned, (tokens, tokens), raises=False).findings if f.status == "fail"}
    assert "multipliers" in failed
    other = mue.transfer(
        planned.inputs.base, replace(planned.target, router="hash", router_settings={}), planned.inputs.tuned
    )
    told = mue.check(model, other, only=("gates",), raises=False).findings
    assert any(f.status == "fail" and f"router {planned.target.blocks[0].router}" in f.measured for f in told)


def test_a_schedule_over_layers_trains(tmp_path: Path, corpus: Corpus) -> None:
    scheduled = plan("dynamoe", schedule={"name": "descending", "active": "share"})
    routers = [m for m in LanguageModel(scheduled.target, scheduled.multipliers).modules() if isinstance(m, BaseRouter)]
    assert [(r.experts, r.active) for r in routers] == [(24, 4), (8, 2)]
    asked = replace(run(corpus, "dynamoe"), plan=scheduled)
    assert train(asked, Store(tmp_path), corpus)["status"] == "finished"
