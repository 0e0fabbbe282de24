"""Losses by name, from a router's settings to what is trained: alone, stacked, beside the run's own."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import mue
from mue.lab.data import Corpus, load_corpus
from mue.lab.data.spec import describe_data
from mue.lab.models.language import LanguageModel
from mue.lab.train.run import Run, Settings
from mue.lab.train.session import TrainingSession
from mue.lab.train.stacked_session import StackedSession
from mue.lab.train.step import objective
from mue.moe import Router
from mue.moe.losses.sharpness import entropy
from mue.moe.routers.base import RouterOptions, build

BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
LOSSES = {"entropy": 0.01, "sequence_balance": 0.1}


@pytest.fixture(scope="module")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(texts, cache=tmp_path_factory.mktemp("cache"))


def run(corpus: Corpus, losses: dict[str, float], **tuned: float) -> Run:
    shape = mue.MoE.parse(
        "8e2a", width=32, expert=16, layers=2, head_dim=16, sequence=32, router_settings={"losses": losses}
    )
    training = mue.Training(128, 8)
    values = mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1, **tuned)  # type: ignore[arg-type]
    plan = mue.transfer(BASE, shape, values, base_training=training, training=training)
    settings = Settings(eval_sequences=4, log_every=1, balance="loss" if "balance" in tuned else "bias")
    return Run(plan, settings, describe_data({"source": []}, corpus))


def test_what_is_trained_is_the_loss_and_each_with_its_coefficient(tmp_path: Path, corpus: Corpus) -> None:
    with TrainingSession(run(corpus, LOSSES, z=1e-3), tmp_path, corpus) as session:
        output = session.task.loss(session.model, session.batches.at(0))
        assert set(output.losses) == {"entropy", "sequence_balance", "router_z"}
        routings = output.routings
        mean = sum(entropy(routing) for routing in routings)
        assert torch.allclose(output.losses["entropy"], 0.01 * mean)
        assert all(routing.sequence == 32 for routing in routings)
        total = output.loss + output.losses["entropy"] + output.losses["sequence_balance"]
        assert torch.allclose(objective(output, session.coefficients), total + 1e-3 * output.losses["router_z"])
    plain = LanguageModel(run(corpus, {}).plan.target)
    tokens = torch.randint(256, (2, 32))
    assert plain(tokens, tokens).losses == {}  # the control


def test_the_plan_carries_them_unchanged(corpus: Corpus) -> None:
    plan = run(corpus, LOSSES).plan
    assert plan.target.blocks[0].all_settings["losses"] == LOSSES
    assert "sigmoid: losses (entropy 0.01, sequence_balance 0.1)" in str(plan)
    wider = mue.transfer(plan, mue.MoE(**{**vars(plan.target), "width": 64}), training=plan.training)
    assert wider.target.blocks[0].all_settings["losses"] == LOSSES
    assert run(corpus, LOSSES).key != run(corpus, {}).key == run(corpus, {"entropy": 0.0}).key


def test_stacked_runs_have_them_too(tmp_path: Path, corpus: Corpus) -> None:
    """float64, to 1e-10, against the run alone; without the losses it is another run."""
    ends = {}
    for way in ("alone", "stacked", "without"):
        (tmp_path / way).mkdir()
        with ExitStack() as opened:
            session = TrainingSession(run(corpus, {} if way == "without" else LOSSES), tmp_path / way, corpus)
            session.model.double()
            opened.enter_context(session)
            stack = StackedSession(session, 2) if way == "stacked" else None
            if stack is not None:
                stack.put(0, session)
            for _ in range(3):
                stack.step() if stack is not None else session.train_step()
            ends[way] = session.loss
    assert ends["stacked"] == pytest.approx(ends["alone"], rel=1e-10)
    assert abs(ends["without"] - ends["alone"]) > 1e-7


def test_a_loss_is_asked_for_once_and_by_a_name_that_there_is(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="unknown loss 'entrpy'; did you mean 'entropy'"):
        run(corpus, {"entrpy": 0.1})
    with pytest.raises(ValueError, match=r"losses router_z = 0\.1 among its settings, and \[tuned\] z = 0\.001"):
        run(corpus, {"router_z": 0.1}, z=1e-3)
    with pytest.raises(ValueError, match=r"losses load_balance = 0\.1 .* \[tuned\] balance = 0\.01"):
        run(corpus, {"load_balance": 0.1}, balance=0.01)
    with pytest.raises(ValueError, match="router_z is asked for by the run and among the losses of the sigmoid router"):
        Router(8, 4, 2, z_loss=True, settings={"losses": {"router_z": 0.1}})
    block = mue.Block(layers=1, experts=4, active=2, expert=8, router="hash")
    assert build(block, 8, RouterOptions(balance="loss", z_loss=True)).losses == []  # it has no scores to train
