"""A model in training goes from one form to the other and on, optimizer state included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import mue
from mue.fold import convert, fold
from mue.lab.models.language import LanguageModel
from support.fold_model import Decoder, tokens, train
from support.fold_plans import BASE, MAKE, MOE, OPERATIONS, TUNED, distance, model_of, planned, twins
from support.precision import close

pytestmark = pytest.mark.usefixtures("in_float64")


@pytest.mark.parametrize("optimizer", ["adamw-amsgrad", "nadamw", "sgd", "muon", "adafactor"])
def test_conversion_in_mid_training_both_ways(optimizer: str) -> None:
    """40 steps as planned, 40 folded, 40 as planned again, against 120 in one form."""
    plan = planned(optimizer)
    straight, one = model_of(plan), model_of(plan)
    train(straight, [MAKE[optimizer](plan.param_groups(straight))], 120)

    folded = fold(plan)
    first = MAKE[optimizer](plan.param_groups(one))
    train(one, [first], 40)
    two = Decoder(plan.target, folded.multipliers)
    second = MAKE[optimizer](folded.param_groups(two))
    convert(one, plan, two, folded, first, second)
    assert second.param_groups[0]["lr"] == pytest.approx(second.param_groups[0]["initial_lr"] * (1 - 39 / 200))
    train(two, [second], 40, start=40)
    three = Decoder(plan.target, plan.multipliers)
    third = MAKE[optimizer](plan.param_groups(three))
    convert(two, folded, three, plan, second, third)
    train(three, [third], 40, start=80)
    assert distance(straight, three, plan) < 1e-12


@pytest.mark.parametrize("kind", ["none", "factor", "one cycle", "cyclic"])
def test_the_phase_of_any_schedule_is_carried(kind: str) -> None:
    """Whatever a scheduler leaves in the groups, the rate in the other form is the same multiple of its planned peak."""
    plan = planned("adamw")
    folded = fold(plan)
    one, two = model_of(plan), Decoder(plan.target, folded.multipliers)
    first = torch.optim.AdamW(plan.param_groups(one))
    second = torch.optim.AdamW(folded.param_groups(two))
    peaks = [g["lr"] for g in first.param_groups]
    wanted = [g["lr"] for g in second.param_groups]
    schedules = torch.optim.lr_scheduler
    if kind == "none":
        for g in first.param_groups:
            g["lr"] *= 0.25
    elif kind == "factor":
        schedules.LambdaLR(first, lambda step: 0.25)
    elif kind == "one cycle":
        schedules.OneCycleLR(first, peaks, total_steps=50, div_factor=4, cycle_momentum=False)
    else:
        schedules.CyclicLR(first, [p / 4 for p in peaks], peaks, cycle_momentum=False)
    train_once(one, first)
    convert(one, plan, two, folded, first, second)
    assert [g["lr"] for g in second.param_groups] == pytest.approx([0.25 * w for w in wanted])


def train_once(model: Decoder, optimizer: torch.optim.Optimizer) -> None:
    model(tokens()).sum().backward()
    optimizer.step()


def test_control_conversion_without_the_state() -> None:
    plan = planned("adamw")
    one, folded = model_of(plan), fold(plan)
    first = torch.optim.AdamW(plan.param_groups(one))
    train(one, [first], 50)
    two = Decoder(plan.target, folded.multipliers)
    second = torch.optim.AdamW(folded.param_groups(two))
    convert(one, plan, two, folded)
    train(one, [first], 20, start=50)
    train(two, [second], 20, start=50)
    assert distance(one, two, folded) > 1e-3


def test_from_r_in_the_weights_to_r_in_the_model() -> None:
    plan = planned("adamw")
    one, two, weights = twins(plan)
    engine = fold(plan, "model")
    assert engine.route_scale == 2 and weights.route_scale == 1
    three = Decoder(plan.target, engine.multipliers)
    convert(two, weights, three, engine)
    x = tokens()
    assert close(two(x), one(x), operations=OPERATIONS) and close(three(x), one(x), operations=OPERATIONS)
    train(one, [torch.optim.AdamW(plan.param_groups(one))], 50)
    train(three, [torch.optim.AdamW(engine.param_groups(three))], 50)
    assert distance(one, three, engine) < 1e-12
    both = Decoder(plan.target, replace(engine.multipliers))  # control: R in both places is another model
    both.load_state_dict(two.state_dict())
    assert not close(both(x), one(x), operations=OPERATIONS)


def test_conversion_refuses_what_it_does_not_know() -> None:
    plan = planned("adamw")
    one, two, folded = twins(plan)
    with pytest.raises(ValueError, match="are not two forms of one plan"):
        convert(one, plan, two, fold(plan.scaled(2)))
    first, second = (torch.optim.AdamW(p.param_groups(m)) for p, m in ((plan, one), (folded, two)))
    train(one, [first], 1)
    state = next(iter(first.state.values()))
    state["prodigy_d"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"'prodigy_d' is not in mue\.fold\.FOLDS"):
        convert(one, plan, two, folded, first, second)
    del state["prodigy_d"]
    with pytest.raises(ValueError, match="in no optimizer of the target"):
        convert(one, plan, two, folded, first, torch.optim.AdamW(folded.param_groups(two)[:1]))


def test_a_final_norm_that_multiplies_by_one_plus_w() -> None:
    plan = mue.transfer(replace(BASE, tied=True), replace(MOE, tied=True), TUNED)
    one, folded = model_of(plan), fold(plan)
    two = Decoder(plan.target, folded.multipliers)
    with torch.no_grad():
        one.norm.weight.fill_(0.25)  # means a gain of 1.25
    convert(one, plan, two, folded, gain_offset=1.0)
    assert torch.allclose(two.norm.weight, torch.tensor(1.25 / 3 - 1))


def test_a_balance_bias_that_is_a_parameter_needs_no_optimizer() -> None:
    """As ERNIE-4.5 has it: a value that moves with its model, and is in no group."""

    class Biased(LanguageModel):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.blocks[0].moe.router.shift = nn.Parameter(torch.ones(4), requires_grad=False)

        def layout(self) -> Any:
            return [*super().layout(), mue.Layout("blocks.*.moe.router.shift", "router_bias", ("vector",))]

    shape = mue.MoE.parse("4e2a", width=32, expert=16, layers=1, head_dim=16, sequence=16, vocab=64)
    plan = mue.transfer(mue.Dense(16, 16, 1, head_dim=16, vocab=64), shape, TUNED)
    folded = fold(plan)
    one, two = Biased(shape, plan.multipliers), Biased(shape, folded.multipliers)
    plan.init_(one)
    optimizers = [torch.optim.AdamW(p.param_groups(m)) for p, m in ((plan, one), (folded, two))]
    with torch.no_grad():
        two.blocks[0].moe.router.shift.zero_()
    convert(one, plan, two, folded, *optimizers)
    assert bool((two.blocks[0].moe.router.shift == 1).all())
