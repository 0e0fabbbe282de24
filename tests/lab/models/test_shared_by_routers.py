"""What the routers of a model share (mue.moe.routers.base.share): whose it is, when it changes, and that a run goes on with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mue
from mue.lab.data import Corpus, load_corpus
from mue.lab.data.spec import describe_data
from mue.lab.models.language import LanguageModel
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.session import TrainingSession, train
from mue.lab.train.stacked_session import StackedSession
from mue.moe import Routing
from mue.moe.routers.base import ROUTER_CLASSES, BaseRouter, RouterInput, router
from mue.shapes import ROUTERS, Setting

BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
STEPS = 8


class Pooled(nn.Module):
    """The load of all layers together, and how often it was told of a step."""

    def __init__(self, routers: Sequence[Any]) -> None:
        super().__init__()
        self.routers = [*routers]  # a list: no part of this module
        self.register_buffer("load", torch.zeros(routers[0].experts, dtype=torch.int64))
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))

    def end_step_(self, bias_speed: float) -> None:
        self.turn += 1
        assert all(int(one.turn) == int(self.turn) for one in self.routers)  # theirs come first
        for one in self.routers:
            self.load += one.load
            one.load.zero_()


@pytest.fixture(autouse=True)
def turning() -> Iterator[type[BaseRouter]]:
    """A router that goes to other experts in each step, by what all layers share."""

    @router("turning", even=True, settings={"by": Setting(default=1, low=1)})
    class Turning(BaseRouter):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.register_buffer("load", torch.zeros(self.experts, dtype=torch.int64))
            self.register_buffer("turn", torch.zeros((), dtype=torch.int64))

        @classmethod
        def shared(cls, routers: Sequence[Any]) -> nn.Module:
            return Pooled(routers)

        def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
            assert isinstance(self.common, Pooled)
            expert_K = torch.arange(self.active) + self.common.turn * self.options.settings["by"]
            routing = self.even((expert_K % self.experts).expand(len(x_TD), -1), x_TD.dtype)
            if self.training:
                self.load += routing.stats["load"]
            return routing

        def end_step_(self, bias_speed: float) -> None:
            self.turn += 1

    yield Turning
    for registry in (ROUTERS, ROUTER_CLASSES):
        registry._entries.pop("turning")


@pytest.fixture(scope="module")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(texts, cache=tmp_path_factory.mktemp("cache"))


def run_of(corpus: Corpus, seed: int = 0, **settings: int) -> Run:
    shape = mue.MoE.parse(
        "8e2a", width=32, expert=16, layers=2, head_dim=16, sequence=32, router="turning", router_settings=settings
    )
    training = mue.Training(batch=128, steps=STEPS)
    tuned = mue.HParams(lr=8e-3, weight_decay=0.1, init_std=0.1)
    plan = mue.transfer(BASE, shape, tuned, base_training=training, training=training)
    return Run(plan, Settings(seed=seed, eval_sequences=4, log_every=1), describe_data({"source": []}, corpus))


def test_the_model_owns_what_its_routers_share(corpus: Corpus) -> None:
    model = LanguageModel(run_of(corpus).plan.target)
    pooled = model.common["turning"]
    routers = [block.moe.router for block in model.blocks]  # type: ignore[union-attr]
    assert all(one.common is pooled for one in routers)
    assert [name for name in model.state_dict() if "common" in name] == ["common.turning.load", "common.turning.turn"]
    twin = copy.deepcopy(model)  # the copy's routers share the copy's module
    assert twin.blocks[0].moe.router.common is twin.common["turning"] is not pooled  # type: ignore[union-attr]
    plain = LanguageModel(mue.MoE.parse("8e2a", width=32, expert=16, layers=2, head_dim=16, sequence=32))
    assert not hasattr(plain, "common") and not [name for name in plain.state_dict() if "common" in name]


def stop(step: int, loss: float) -> None:
    if step >= 5:
        raise KeyboardInterrupt


def test_it_survives_an_interruption(tmp_path: Path, corpus: Corpus) -> None:
    asked, whole, broken = run_of(corpus), Store(tmp_path / "whole"), Store(tmp_path / "broken")
    train(asked, whole, corpus, keep_weights=True)
    with pytest.raises(KeyboardInterrupt):
        train(asked, broken, corpus, progress=stop, checkpoint_seconds=0)
    train(asked, broken, corpus, keep_weights=True)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (whole.folder(asked.key) / name).read_bytes() == (broken.folder(asked.key) / name).read_bytes(), name
    stored = load_file(whole.folder(asked.key) / "model.safetensors")
    # every token of 8 steps has 2 experts in each of 2 layers, and they went once around all experts
    assert int(stored["common.turning.turn"]) == STEPS and stored["common.turning.load"].sum() == STEPS * 128 * 4
    other = train(run_of(corpus, by=3), whole, corpus)  # the control: its setting reaches the router
    assert other["key"] != asked.key and other["val_loss"] != whole.result(asked.key)["val_loss"]  # type: ignore[index]


def test_stacked_variants_have_their_own(tmp_path: Path, corpus: Corpus, turning: type[BaseRouter]) -> None:
    turns = []
    with ExitStack() as opened:
        sessions = []
        for seed in (0, 1):
            (tmp_path / str(seed)).mkdir()
            sessions.append(opened.enter_context(TrainingSession(run_of(corpus, seed), tmp_path / str(seed), corpus)))
        stack = StackedSession(sessions[0], 2)
        stack.put(0, sessions[0])
        stack.step()
        stack.put(1, sessions[1])  # one step later
        stack.step()
        turns = [int(session.model.common["turning"].turn) for session in sessions]
    assert turns == [2, 1]
    turning.kind = replace(turning.kind, stackable=False)
    ROUTERS._entries["turning"] = (100.0, turning.kind)
    with pytest.raises(ValueError, match="runs with the turning router cannot be stacked: its layers share trained"):
        StackedSession(sessions[0], 2)
