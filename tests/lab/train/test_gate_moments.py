"""mue.lab.train.gate_moments: what a router's weights are at init, of a router that nobody here knows, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mue
from mue.checks import CheckError
from mue.lab.data import Corpus
from mue.lab.models.language import LanguageModel
from mue.lab.train.gate_moments import LayerGates, by_layer, measure_gates
from mue.lab.train.run import Settings
from mue.moe import Routing, gate_moments
from mue.moe.routers.base import ROUTER_CLASSES, BaseRouter, RouterInput, router
from mue.plan.plan import Inputs, PlanData
from mue.plan.transfer import plan_of
from mue.shapes import MEASURED, ROUTERS, Setting

BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
TUNED = mue.HParams(lr=0.008, weight_decay=0.1, init_std=0.1)


@pytest.fixture(autouse=True)
def theirs() -> Iterator[None]:
    """Two routers of somebody's own, without a word on their moments: one raw, one that weighs by what its layer is."""

    @router("raw", unit_sum=False, matrix=True, settings={"keep": Setting(default=1.0, low=0.0, low_open=True)})
    class Raw(BaseRouter):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.weight = nn.Parameter(torch.zeros(self.experts, self.width))

        def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
            part_TN = torch.softmax(x_TD.float() @ self.weight.float().T, 1)
            weight_TK, expert_TK = part_TN.topk(self.active)
            return self.routing(expert_TK, weight_TK * self.options.settings["keep"] * self.route_scale)

    @router("flat", unit_sum=False)
    class Flat(BaseRouter):
        def forward(self, x_TD: Tensor, given: RouterInput | None = None) -> Routing:
            expert_TK = (torch.arange(len(x_TD))[:, None] + torch.arange(self.active)) % self.experts
            return self.routing(
                expert_TK, torch.full(expert_TK.shape, 0.3 + 0.2 * self.options.layer) * self.route_scale
            )

    yield
    for registry in (ROUTERS, ROUTER_CLASSES):
        for name in ("raw", "flat"):
            registry._entries.pop(name)


def inputs_of(router: str, **numbers: Any) -> Inputs:
    given = {"width": 32, "expert": 32, "layers": 2, "head_dim": 16, "sequence": 32, "router": router, **numbers}
    shape = mue.MoE.parse("8e2a", gates=MEASURED, gate_moments=(1.0, 1.0), **given)
    return mue.transfer(BASE, shape, TUNED).inputs


def planned(inputs: Inputs, pair: tuple[float, float]) -> PlanData:
    assert isinstance(inputs.target, mue.MoE)
    return plan_of(replace(inputs, target=replace(inputs.target, gate_moments=pair)))


def test_without_them_it_is_refused_and_told_where_they_come_from() -> None:
    with pytest.raises(ValueError, match=r"gate_moments \(mue plan FILE --measure-gates writes them\)"):
        mue.MoE.parse("8e2a", width=32, expert=32, layers=2, head_dim=16, router="raw")


def test_weights_that_are_known_are_found_layer_by_layer(corpus: Corpus) -> None:
    found = measure_gates(inputs_of("flat"), Settings(), corpus, draws=2, tokens=256)
    assert [(one.layer, one.m1, one.m2, one.active) for one in found] == [
        (0, pytest.approx(0.6), pytest.approx(0.18), 2.0),
        (1, pytest.approx(1.0), pytest.approx(0.5), 2.0),
    ]
    assert all(one.error1 < 1e-6 and one.error2 < 1e-6 for one in found)
    assert by_layer(inputs_of("flat").target, found) == [pytest.approx((0.6, 0.18)), pytest.approx((1.0, 0.5))]


def test_dense_layers_before_those_with_experts_are_passed_over(corpus: Corpus) -> None:
    inputs = inputs_of("flat")
    experts = replace(inputs.target.blocks[0], layers=1)
    shape = mue.Mixed(32, (mue.Block(layers=1, ffn=32), experts), head_dim=16, sequence=32)
    found = measure_gates(replace(inputs, target=shape), Settings(), corpus, draws=2, tokens=256)
    assert [(one.layer, one.m1) for one in found] == [(1, pytest.approx(1.0))]


def test_layers_that_agree_share_a_pair() -> None:
    def gates(layer: int, m1: float, error: float = 1e-3) -> LayerGates:
        return LayerGates(layer, m1, m1 * m1 / 2, error, error, 2.0)

    shape = mue.MoE.parse("8e2a", width=32, expert=32, layers=3, head_dim=16)
    assert by_layer(shape, [gates(0, 1.0), gates(1, 1.01), gates(2, 0.99)]) == [(1.0, pytest.approx(0.5, rel=1e-3))]
    # within their intervals, though not within 2 %
    assert len(by_layer(shape, [gates(0, 1.0, 0.2), gates(1, 1.1, 0.2)])) == 1
    apart = by_layer(shape, [gates(0, 1.0), gates(1, 1.0), gates(2, 1.1)])
    assert apart == [(1.0, 0.5), (1.0, 0.5), (1.1, pytest.approx(0.605))]


def test_the_interval_holds_what_other_inits_and_wide_experts_give(corpus: Corpus) -> None:
    """Routers of other inits in the whole model, experts as wide as planned, against narrow ones of the measurement."""
    inputs = inputs_of("raw")
    found = measure_gates(inputs, Settings(), corpus, draws=8, tokens=1024)
    other = measure_gates(inputs, Settings(seed=100), corpus, draws=8, tokens=1024)
    for mine, theirs in zip(found, other, strict=True):
        assert abs(mine.m1 - theirs.m1) < mine.error1 + theirs.error1 < 0.1 * mine.m1
        assert abs(mine.m2 - theirs.m2) < mine.error2 + theirs.error2
    plan, sums = planned(inputs, (found[0].m1, found[0].m2)), []
    for seed in range(8):
        model = LanguageModel(plan.target, plan.multipliers)
        mue.Plan.init_(plan, model, seed)  # type: ignore[arg-type]
        tokens = torch.from_numpy(corpus.train[4096 * seed : 4096 * seed + 1024].astype("int64")).view(-1, 32)
        sums.append([gate_moments(routing)[0] for routing in model(tokens).routings])
    for mine, column in zip(found, zip(*sums, strict=True), strict=True):
        assert abs(mine.m1 - sum(column) / 8) < 2 * mine.error1


def test_a_plan_from_them_passes_every_check_and_one_without_fails(corpus: Corpus) -> None:
    """No check was told anything of this router. Negative control: the plan that takes the weights to sum to one."""
    inputs = inputs_of("raw", router_settings={"keep": 0.5})
    found = measure_gates(inputs, Settings(), corpus, draws=4, tokens=1024)
    right = (sum(one.m1 for one in found) / 2, sum(one.m2 for one in found) / 2)
    tokens = torch.from_numpy(corpus.train[:256].astype("int64")).view(8, 32)
    followed = torch.from_numpy(corpus.train[1:257].astype("int64")).view(8, 32)
    for pair in (right, (1.0, 0.5)):
        plan = planned(inputs, pair)
        face = mue.Plan(**{name: getattr(plan, name) for name in plan.__dataclass_fields__})
        model = LanguageModel(face.target, face.multipliers)
        face.init_(model)
        optimizer = torch.optim.AdamW(face.param_groups(model))
        if pair == right:
            mue.check(model, face, (tokens, followed), optimizer)
        else:
            with pytest.raises(CheckError, match="routed sum"):
                mue.check(model, face, (tokens, followed), optimizer)


def test_its_updates_keep_their_size(corpus: Corpus) -> None:
    """The coordinate check over the width; the moments are those of each width's router."""

    def plan(shape: mue.shapes.Transformer) -> PlanData:
        inputs = replace(inputs_of("raw"), target=shape)
        found = measure_gates(inputs, Settings(), corpus, draws=2, tokens=512)
        return planned(inputs, (sum(one.m1 for one in found) / 2, sum(one.m2 for one in found) / 2))

    def batch(step: int) -> tuple[Tensor, Tensor]:
        window = torch.from_numpy(corpus.train[(step + 1) * 257 : (step + 2) * 257].astype("int64"))
        return window[:-1].view(8, 32), window[1:].view(8, 32)

    shapes = [inputs_of("raw", width=width, expert=width).target for width in (32, 64, 128)]
    made = {shape.width: plan(shape) for shape in shapes}
    mue.coordinate_check(
        lambda shape: LanguageModel(shape, made[shape.width].multipliers),
        lambda shape: made[shape.width],
        {"width": [made[shape.width].target for shape in shapes]},
        batch,
        seeds=(0, 1),
    )
