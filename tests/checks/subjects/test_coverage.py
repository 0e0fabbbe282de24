"""What the plan trains can be trained, and what it does not train cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mue
from mue.checks.report import PASS
from mue.lab.models.language import LanguageModel
from support.wiring.case import BASE, TUNED

SHAPE = mue.MoE.parse("8e2a", width=64, expert=48, layers=2, head_dim=16, sequence=32, vocab=96)


class Biased(LanguageModel):
    """With a balance bias that is a parameter, as ERNIE-4.5 and Laguna have it; or one of the loss, declared as such."""

    trainable = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for block in self.blocks:
            block.moe.router.shift = nn.Parameter(torch.zeros(8), requires_grad=self.trainable)

    def layout(self) -> Any:
        return [*super().layout(), mue.Layout("blocks.*.moe.router.shift", "router_bias", ("vector",))]


class Trained(Biased):
    trainable = True


@pytest.mark.parametrize("kind", [Biased, Trained])
def test_a_balance_bias_stays_and_one_that_can_be_trained_is_refused(kind: type[Biased]) -> None:
    plan = mue.transfer(BASE, SHAPE, TUNED)
    model = kind(SHAPE, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(96, (2, 24))
    report = mue.check(model, plan, (tokens, tokens), only=["coverage", "moved"], raises=False)
    moved = next(f.measured for f in report.findings if f.check == "moved")
    assert "router.shift, blocks.1.moe.router.shift stayed: moved by load" in moved, moved
    if kind is Biased:
        assert {f.status for f in report.findings} == {PASS}, report
    else:
        (found,) = report.failures
        assert found.check == "coverage" and "blocks.0.moe.router.shift" in found.where
        assert "'bias'" in found.mend and "requires_grad_(False)" in found.mend


def test_a_frozen_tensor_of_the_plan_still_fails() -> None:
    plan = mue.transfer(BASE, SHAPE, TUNED)
    model = Biased(SHAPE, plan.multipliers)
    model.blocks[1].moe.router.weight.requires_grad_(False)
    (found,) = mue.check(model, plan, only=["coverage"], raises=False).failures
    assert found.where == "blocks.1.moe.router.weight" and found.measured.endswith("requires_grad = False")
