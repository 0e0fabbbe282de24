"""Routers without a matrix, and one of somebody's own, in whole runs: exact resume, recomputed blocks, stacked variants, every
backend, the checks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mue
from mue.checks import CheckError
from mue.lab.data import Corpus, load_corpus
from mue.lab.data.spec import describe_data
from mue.lab.models.language import LanguageModel
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.session import TrainingSession, train
from mue.lab.train.stacked_session import StackedSession, stack_kind
from mue.lab.train.step import objective
from mue.layouts.layout import Layout
from mue.moe import MoELayer, Routing
from mue.moe.routers.base import ROUTER_CLASSES, BaseRouter, RouterInput, RouterOptions, router
from mue.moe.routers.ops import select_top
from mue.shapes import ROUTERS
from support.precision import close
from support.small_run import Stop, stop_at

BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
EXPERTS = {"hash": "8e2a1s", "random": "8e4a2g", "thor": "4e1a"}
SCORED = {"switch": "8e2a1s", "expert-choice": "8e2a", "quantile": "8e4a2g"}
STEPS = 12


@pytest.fixture(autouse=True)
def tempered() -> Iterator[type[BaseRouter]]:
    """A router with a parameter and a loss that no other router has."""

    @router("tempered", unit_sum=True, score="softmax", matrix=True)
    class Tempered(BaseRouter):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.weight = nn.Parameter(torch.zeros(self.experts, self.width))
            self.temperature = nn.Parameter(torch.ones(1))

        def layout(self) -> Sequence[Layout]:
            return [*super().layout(), Layout("temperature", "norm", ("vector",), start=1.5)]

        def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
            logit_TN = F.linear(x_TD, self.weight)  # the temperature is moved by its loss alone
            expert_TK = select_top(logit_TN.detach(), self.active, self.groups)
            routing = self.routing(expert_TK, torch.softmax(logit_TN.gather(1, expert_TK), 1) * self.route_scale)
            routing.scores_TN, routing.logits_TN = torch.softmax(logit_TN, 1), logit_TN
            routing.losses["temperature"] = self.temperature.log().square().sum()
            return routing

    yield Tempered
    for registry in (ROUTER_CLASSES, ROUTERS):
        registry._entries.pop("tempered")  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(texts, cache=tmp_path_factory.mktemp("cache"))


def shape(router: str) -> mue.MoE:
    return mue.MoE.parse(
        {**EXPERTS, **SCORED}.get(router, "8e2a"),
        width=32,
        expert=16,
        layers=2,
        head_dim=16,
        sequence=32,
        router=router,
    )


def run(corpus: Corpus, router: str, **settings: object) -> Run:
    z = 1e-3 if ROUTERS[router].matrix else 0.0  # a loss on logits, which a router without a matrix has none of
    tuned = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1, z=z)
    training = mue.Training(128, STEPS)
    plan = mue.transfer(BASE, shape(router), tuned, base_training=training, training=training)
    given = Settings(**{"eval_every": 6, "eval_sequences": 8, "log_every": 1, **settings})  # type: ignore[arg-type]
    return Run(plan, given, describe_data({"source": []}, corpus))


@pytest.mark.parametrize("router", [*EXPERTS, "thor, consistent", *SCORED])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, corpus: Corpus, router: str) -> None:
    router, consistent = router.partition(",")[::2]
    asked = run(corpus, router, consistency=5.0 if consistent else 0.0)
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    result = train(asked, whole, corpus, keep_weights=True)
    with pytest.raises(Stop):
        train(asked, broken, corpus, progress=stop_at(5), checkpoint_seconds=0)
    train(asked, broken, corpus, keep_weights=True)
    for name in ("metrics.jsonl", "model.safetensors", "routers.json"):
        assert (whole.folder(asked.key) / name).read_bytes() == (broken.folder(asked.key) / name).read_bytes(), name
    assert result["status"] == "finished"
    rows = [json.loads(line) for line in (whole.folder(asked.key) / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    used = {tuple(row["load"][0]) for row in rows}
    assert (1 in {share for load in used for share in load}) == (router == "thor")
    other = train(replace(asked, settings=replace(asked.settings, seed=1)), whole, corpus)
    assert other["val_loss"] != result["val_loss"]  # the control


def test_without_its_step_a_resumed_run_draws_otherwise(tmp_path: Path, corpus: Corpus) -> None:
    """Negative control of the test above: what the checkpoint holds is what makes it exact."""
    with TrainingSession(run(corpus, "random"), tmp_path, corpus) as session:
        for _ in range(5):
            session.train_step()
        steps = [value for name, value in session.model.state_dict().items() if name.endswith("router.step")]
        assert [int(step) for step in steps] == [5, 5]
        tokens = torch.randint(256, (2, 32))
        before = session.model(tokens, tokens).routings[0].expert_P
        steps[0].zero_()
        assert not torch.equal(before, session.model(tokens, tokens).routings[0].expert_P)


@pytest.mark.parametrize("router", [*EXPERTS, "thor, consistent", "tempered", *SCORED])
def test_stacked_runs_are_themselves(tmp_path: Path, corpus: Corpus, router: str) -> None:
    """float64, to 1e-10, of two seeds, one of which joins later: its step is its own."""
    router, consistent = router.partition(",")[::2]
    asked = {"consistency": 5.0 if consistent else 0.0, "eval_every": 2}  # validation is stacked as well
    runs = [run(corpus, router, seed=s, **asked) for s in (0, 1)]
    assert stack_kind(runs[0]) == stack_kind(runs[1])
    rows: dict[str, list[list[dict[str, object]]]] = {}
    for way in ("alone", "stacked"):
        with ExitStack() as opened:
            sessions = []
            for i, each in enumerate(runs):
                folder = tmp_path / way / str(i)
                folder.mkdir(parents=True)
                session = TrainingSession(each, folder, corpus)
                session.model.double()
                sessions.append(opened.enter_context(session))
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


def test_a_router_trains_parameters_and_a_loss_of_its_own(tmp_path: Path, corpus: Corpus) -> None:
    """They are planned and checked like all others, and the loss counts though no setting names it."""
    asked = run(corpus, "tempered")
    with TrainingSession(asked, tmp_path, corpus) as session:
        own = [p for name, p in session.model.named_parameters() if name.endswith("router.temperature")]
        assert len(own) == 2 and all(p.item() == 1.5 for p in own)
        tokens = torch.randint(256, (2, 32))
        batch = tokens, tokens
        with pytest.raises(CheckError, match=r"moved: .*router\.temperature"):  # nothing else moves it
            mue.check(session.model, asked.plan, batch, session.optimizer)
        mue.check(
            session.model, asked.plan, batch, session.optimizer,
            loss=lambda model, batch: objective(model(*batch), session.coefficients),
        )  # fmt: skip
        output = session.model(tokens, tokens)
        assert output.losses["temperature"].item() == pytest.approx(2 * torch.tensor(1.5).log().square().item())
        whole = objective(output, session.coefficients)
        of_run = asked.plan.tuned.z * output.losses["router_z"]  # the run's, from the logits that the router gives
        assert whole.item() == pytest.approx((output.loss + output.losses["temperature"] + of_run).item())
        for _ in range(3):
            session.train_step()
        assert all(p.item() < 1.5 for p in own)


def test_control_a_parameter_that_its_router_does_not_name_is_refused(tempered: type[BaseRouter]) -> None:
    plan = mue.transfer(BASE, shape("tempered"), mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1))
    model = LanguageModel(plan.target, plan.multipliers)
    tempered.layout = BaseRouter.layout  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"router\.temperature"):
        plan.init_(model)


def test_consistency_is_refused_without_a_draw_and_keeps_old_keys(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match=r'no router of 8e2a1s d32 L2 draws any: .* router = "thor"'):
        run(corpus, "hash", consistency=1.0)
    plain, consistent = run(corpus, "thor"), run(corpus, "thor", consistency=1.0)
    assert "consistency" not in plain.effective["settings"] and plain.key != consistent.key
    assert stack_kind(plain) != stack_kind(consistent)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("router", [*EXPERTS, *SCORED])
def test_every_backend_computes_the_same(router: str) -> None:
    torch.manual_seed(0)
    x, tokens = torch.randn(2, 32, 32, requires_grad=True), torch.randint(256, (2, 32))
    found = []
    for backend in ("native", "portable", "reference"):
        torch.manual_seed(1)
        layer = MoELayer.from_block(shape(router).blocks[0], 32, RouterOptions(route_scale=2.0), backend=backend)
        y, _ = layer(x, given=RouterInput(tokens))
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for ours, exact in zip(*found[::2], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    for ours, exact in zip(*found[1:], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", [*EXPERTS, *SCORED])
def test_a_recomputed_block_draws_what_it_drew(router: str) -> None:
    torch.manual_seed(2)
    model = LanguageModel(shape(router), seed=4)
    given, x = RouterInput(torch.randint(256, (2, 32))), torch.randn(2, 32, 32, requires_grad=True)
    block = model.blocks[0]
    straight, again = (
        torch.autograd.grad(forward()[0].square().sum(), [x, *block.moe.parameters()])
        for forward in (lambda: block(x, given), lambda: checkpoint(block, x, given, use_reentrant=False))
    )
    operations = 2 * (
        7 * 32 + 2 * 32 + 64
    )  # forwards and back: products over the width, attention, sums over the tokens
    for once, anew in zip(straight, again, strict=True):
        assert close(anew, once, operations=operations)
        assert not once.any() or not close(1.01 * anew, once, operations=operations)  # negative control
    assert sum(bool(once.any()) for once in straight) >= 4


@pytest.mark.parametrize("router", EXPERTS)
def test_the_checks_pass_and_see_what_is_wrong(router: str) -> None:
    tuned = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1)
    plan = mue.transfer(BASE, shape(router), tuned)
    model = LanguageModel(plan.target, plan.multipliers, seed=5)
    plan.init_(model)
    tokens = torch.randint(256, (2, 32))
    groups = plan.param_groups(model)
    report = mue.check(model, plan, (tokens, tokens), torch.optim.AdamW(groups))
    assert {f.check for f in report.findings if f.status == "pass"} >= {
        "coverage",
        "init",
        "groups",
        "multipliers",
        "gates",
        "moved",
    }
    assert sum(p.numel() for g in groups for p in g["params"]) == plan.target.parameters
    static = {f.status for f in mue.check(model, plan, only=("gates",)).findings}
    assert static == ({"left out"} if router == "hash" else {"pass"})

    one = model.blocks[1].moe.router
    one.route_scale *= 1.5  # R wrong in one layer
    failed = {f.check for f in mue.check(model, plan, (tokens, tokens), raises=False).findings if f.status == "fail"}
    assert "multipliers" in failed
    one.route_scale /= 1.5
    if router != "thor":  # the planned experts with other weights: their sum is right, they are not even
        even = one.even

        def uneven(expert_TK: torch.Tensor, dtype: torch.dtype) -> object:
            routing = even(expert_TK, dtype)
            tilt = torch.linspace(0.9, 1.1, one.active).repeat(routing.num_tokens)
            return replace(routing, weight_P=routing.weight_P * tilt)

        one.even = uneven
        findings = mue.check(model, plan, (tokens, tokens), only=("gates",), raises=False).findings
        assert any(f.status == "fail" and "equal weights" in f.expected for f in findings)
        del one.even
    planned = mue.transfer(BASE, replace(plan.target, router="random" if router == "hash" else "hash"), tuned)
    told = mue.check(model, planned, only=("gates",), raises=False).findings
    assert any(f.status == "fail" and f"router {router}" in f.measured for f in told)
