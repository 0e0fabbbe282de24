"""Every row of the fold's table (6.2): the same training without forward multipliers, for every optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import mue
from mue.fold import FOLDS, coefficients, fold_numbers
from support.fold_model import train
from support.fold_plans import FAMILY, MAKE, OPERATIONS, SIZES, STEPS, TUNED, distance, planned, twins
from support.precision import rounding

pytestmark = pytest.mark.usefixtures("in_float64")


class Net(torch.nn.Module):
    """Two layers of which the second is three stacked experts with biases; each weight is used through its own c."""

    def __init__(self, scale: tuple[float, ...]) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(5)
        shapes = ((8, 6), (3, 7, 8), (3, 1, 7), (5, 7))
        self.weights = torch.nn.ParameterList(0.4 * torch.randn(s, generator=noise) for s in shapes)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        first, experts, bias, last = (c * w for c, w in zip(self.scale, self.weights, strict=True))
        return (torch.tanh(x @ first.mT) @ experts.mT + bias).tanh().mean(0) @ last.mT

    def run(self, optimizer: Optimizer, steps: int) -> None:
        for step in range(steps):
            x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - step / 300)
            optimizer.zero_grad()
            (self(x) - x[:, :5].sin()).square().mean().backward()
            optimizer.step()


def net_groups(optimizer: str, net: Net, cs: tuple[float, ...], lr: float, eps: float) -> list[dict[str, Any]]:
    """One group per weight, with ``cs`` folded into its numbers."""
    made = []
    for w, c in zip(net.weights, cs, strict=True):
        a, b, e = fold_numbers(optimizer, c, lr, 0.5, eps)
        extra = {"eps": (e, 1e-3 * c)} if optimizer == "adafactor" else {"eps": e}
        made.append({"params": [w], "lr": a, "weight_decay": b, "momentum": 0.9, "betas": (0.9, 0.95), **extra})
    return made


def test_every_row_of_the_table_is_trained() -> None:
    assert set(FOLDS) == {FAMILY.get(name, name) for name in MAKE}


@pytest.mark.parametrize("name", list(MAKE))
def test_two_hundred_steps_in_float64(name: str) -> None:
    """The fold is exact, for every optimizer that has a row."""
    optimizer = FAMILY.get(name, name)
    # The eigenbasis of a matrix without full rank is stable only if nothing is rounded.
    cs = (1.0, 0.25, 0.25, 2.0) if name == "soap" else (1.0, 8 / 9, 8 / 9, 0.37)
    lr = {"sgd": 0.1, "hyperball": 0.02, "lars": 0.02}.get(optimizer, 4e-3)
    eps = 1e-30 if optimizer == "adafactor" else 1e-3
    one, two = Net(cs), Net((1.0,) * 4)
    with torch.no_grad():
        for w, c in zip(two.weights, cs, strict=True):
            w.mul_(c)
    start = [w.clone() for w in one.weights]
    one.run(MAKE[name](net_groups(optimizer, one, (1.0,) * 4, lr, eps)), STEPS)
    two.run(MAKE[name](net_groups(optimizer, two, cs, lr, eps)), STEPS)
    for w, v, before, c in zip(one.weights, two.weights, start, cs, strict=True):
        assert ((c * w - v).abs().max() / v.abs().max()).item() < 1e-12
        assert ((w - before).norm() / before.norm()).item() > 0.02, "a training that does not move proves nothing"


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", "adamw-independent", "adam-l2", "nadamw", "lion", "sgd", "muon", "lamb", "adafactor", "hyperball"],
)
def test_a_planned_model_and_its_folded_form(optimizer: str) -> None:
    """Every optimizer a plan can be made for, through ``param_groups``, on a decoder with every role and with biases."""
    plan = planned(optimizer)
    one, two, folded = twins(plan)
    steps = STEPS if optimizer == "adamw" else 50
    train(one, [MAKE[optimizer](plan.param_groups(one))], steps)
    train(two, [MAKE[optimizer](folded.param_groups(two))], steps)
    assert distance(one, two, folded) < 1e-12


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "sgd", "adafactor"])
@pytest.mark.parametrize("forgotten", ["lr", "weight_decay", "eps"])
def test_control_forgetting_a_cell(optimizer: str, forgotten: str) -> None:
    """Folding the weights and leaving out one number is seen at once; where the table has no change there is nothing to forget."""
    power = getattr(FOLDS[optimizer], forgotten)
    if power in (None, 0):
        return
    plan = planned(optimizer)
    one, two, folded = twins(plan)
    c = coefficients(folded, two)
    wrong = []
    for g in folded.param_groups(two):
        for p in g["params"]:
            value = g[forgotten]
            back = (value[0] / c[p] ** power, value[1]) if isinstance(value, tuple) else value / c[p] ** power
            wrong.append({**g, "params": [p], forgotten: back})
    train(one, [MAKE[optimizer](plan.param_groups(one))], 40)
    train(two, [MAKE[optimizer](wrong)], 40)
    visible = distance(one, two, folded) > 1e-6
    # eps1 of Adafactor is a guard against dividing by zero: it binds nowhere, so forgetting it shows nowhere.
    assert visible or (optimizer, forgotten) == ("adafactor", "eps")


def test_control_copying_adamw_to_another_optimizer() -> None:
    """AdamW's row (lr·c) is badly wrong for a relative optimizer, and for SGD."""
    for optimizer in ("lamb", "sgd"):
        plan = planned(optimizer)
        one, two, folded = twins(plan)
        c = coefficients(folded, two)
        copied = []
        for g in folded.param_groups(two):
            for p in g["params"]:
                lr = g["lr"] / c[p] ** FOLDS[optimizer].lr * c[p] ** FOLDS["adamw"].lr
                copied.append({**g, "params": [p], "lr": lr})
        train(one, [MAKE[optimizer](plan.param_groups(one))], 20)
        train(two, [MAKE[optimizer](copied)], 20)
        assert distance(one, two, folded) > 1e-2, optimizer


def updated(plan: mue.Plan, make: Callable[[list[dict[str, Any]]], list[Optimizer]], steps: int) -> float:
    """The distance of both forms after updates with the same gradients, which one has times c.

    Gradients are given and not computed: those of two models are products of different numbers, equal but for rounding.
    """
    one, two, folded = twins(plan)
    c = coefficients(folded, two)
    optimizers = [(make(p.param_groups(m)), m) for p, m in ((plan, one), (folded, two))]
    noise = torch.Generator().manual_seed(1)
    for step in range(steps):
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            q.grad = 0.1 * torch.randn(q.shape, generator=noise)
            p.grad = q.grad * c[q]
        for own, _ in optimizers:
            for optimizer in own:
                for group in optimizer.param_groups:
                    group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - step / 200)
                optimizer.step()
    return distance(one, two, folded)


def test_bitwise_in_float32_for_powers_of_two() -> None:
    """Every rounding of an update is the same; of whole trainings, what is not rounding is the same."""
    torch.set_default_dtype(torch.float32)
    adamw = lambda groups: [torch.optim.AdamW(groups)]  # noqa: E731
    base = mue.Dense(width=4, ffn=4, layers=1, **SIZES)
    target = mue.MoE.parse("8e2a", width=8, expert=8, layers=2, **SIZES)
    plan = mue.transfer(base, target, TUNED)
    one, two, folded = twins(plan)
    assert sorted(set(coefficients(folded, two).values())) == [0.5, 1.0]  # residual 1/2, head 1/2, A·R·1/2 = 1/2
    assert updated(plan, adamw, 100) == 0.0
    assert 0 < updated(planned("adamw"), adamw, 100) < 1e-4  # control: with another c it is close, not equal
    train(one, adamw(plan.param_groups(one)), 100)
    train(two, adamw(folded.param_groups(two)), 100)
    bound = rounding(
        torch.float32, 2 * OPERATIONS
    )  # one step forward and back: with its large eps AdamW enlarges nothing
    assert distance(one, two, folded) <= bound
    one, two, folded = twins(plan)
    with torch.no_grad():
        two.layers[0].o.weight.mul_(1.01)  # type: ignore[union-attr]  # control: one multiplier off by 1 %
    train(one, adamw(plan.param_groups(one)), 100)
    train(two, adamw(folded.param_groups(two)), 100)
    assert distance(one, two, folded) > bound


def muon_pair(groups: list[dict[str, Any]]) -> list[Optimizer]:
    """torch's own Muon for the matrices, AdamW for the rest."""
    drop = ("algorithm", "betas", "eps", "roles")
    matrices = [{k: v for k, v in g.items() if k not in drop} for g in groups if g["algorithm"] == "muon"]
    rest = [g for g in groups if g["algorithm"] == "adamw"]
    return [torch.optim.Muon(matrices), torch.optim.AdamW(rest)]  # type: ignore[list-item]


def test_torch_muon_is_exact_for_powers_of_two_only() -> None:
    """Its iteration runs in bf16 : with powers of two it starts from the same bits in both forms."""
    torch.set_default_dtype(torch.float32)
    base, tuned = mue.Dense(width=4, ffn=4, layers=1, **SIZES), TUNED.replace(optimizer="muon")
    exactly, roughly = (
        mue.transfer(base, target, tuned)
        for target in (
            mue.Dense(width=8, ffn=16, layers=2, **SIZES),
            mue.Dense(width=12, ffn=20, layers=3, **SIZES),
        )
    )
    assert updated(exactly, muon_pair, 60) == 0.0
    assert updated(roughly, muon_pair, 60) > 1e-4
