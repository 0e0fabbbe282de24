"""The model must be the planned one: sizes of every tensor, and who may read something else than the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import nn

import mue
from mue.lab.models.language import LanguageModel
from mue.layouts.layout import Layout
from mue.model.match import match_model
from mue.model.tensor_plan import tensor_plans

BASE = mue.Dense(width=32, ffn=32, layers=2, head_dim=16, vocab=48)
TARGET = mue.MoE.parse("8e2a", width=64, expert=40, layers=2, head_dim=16, vocab=48)
TUNED = mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02)


class RouterMLP(LanguageModel):
    """The same model with a router of two matrices: width → latent → experts."""

    def __init__(self, plan: mue.Plan, latent: int, read: int, scores: int) -> None:
        super().__init__(plan.target, plan.multipliers)
        for block in self.blocks:
            block.moe.router.inner = nn.Linear(plan.target.width, latent, bias=False)  # type: ignore[union-attr]
            block.moe.router.weight = nn.Parameter(block.moe.router.weight.new_empty(scores, read))  # type: ignore[union-attr]

    def layout(self) -> Sequence[Layout]:
        return [*super().layout(), Layout("blocks.*.moe.router.inner.weight", "router", ("out", "in"))]


def test_a_router_that_is_an_mlp_has_its_own_fan_ins() -> None:
    """Conventions 8: f/f* in place of r for every role that reads the residual width, the router among them."""
    plan = mue.transfer(BASE, TARGET, TUNED)
    found = {s.info.name: s.values for s in tensor_plans(plan, RouterMLP(plan, latent=16, read=16, scores=8))}
    planned = plan.roles["router"].values
    assert found["blocks.0.moe.router.inner.weight"] == planned
    last, ratio = found["blocks.0.moe.router.weight"], 16 / 64
    assert last.init_std == pytest.approx(planned.init_std * ratio**-0.5)  # type: ignore[operator]
    assert last.lr == pytest.approx(planned.lr / ratio)  # type: ignore[operator]
    assert last.weight_decay == pytest.approx(planned.weight_decay * ratio)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("latent", "read", "scores", "message"),
    [
        (16, 24, 8, r"router\.weight \(8, 24\): fan-in 24, planned 64"),
        (16, 16, 6, r"router\.weight \(6, 16\): fan-in 16, planned 64"),
        (16, 64, 6, r"router\.weight \(6, 64\): experts 6, planned 8"),
        (64, 64, 64, r"router\.weight \(64, 64\): experts 64, planned 8"),
    ],
)
def test_a_router_whose_matrices_do_not_meet_is_refused(latent: int, read: int, scores: int, message: str) -> None:
    plan = mue.transfer(BASE, TARGET, TUNED)
    with pytest.raises(ValueError, match=message):
        match_model(plan, RouterMLP(plan, latent, read, scores))


def test_what_reads_the_residual_stream_has_its_width() -> None:
    plan = mue.transfer(BASE, TARGET, TUNED)
    model = LanguageModel(plan.target, plan.multipliers)
    for name in ("experts_up", "experts_gate"):
        weight = getattr(model.blocks[1].moe, name)
        setattr(model.blocks[1].moe, name, nn.Parameter(weight.new_empty(8, 40, 24)))
    with pytest.raises(ValueError, match=r"blocks\.1\.moe\.experts_up \(8, 40, 24\): residual width 24, planned 64"):
        match_model(plan, model)
