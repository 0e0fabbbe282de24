"""Weights that a router promises to sum to one are looked at, whatever else differs by token; those that it does not promise are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mue
from mue.lab.models.language import LanguageModel
from mue.shapes import ROUTERS

BASE = mue.Dense(width=32, ffn=32, layers=2, head_dim=16, sequence=16, vocab=64)
TUNED = mue.HParams(lr=8e-3, weight_decay=0.1, init_std=0.1)
TOKENS = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
SUMMING = {"dtop-p": {}, "top-p": {"renormalise": True}}


def built(router: str, settings: dict[str, Any]) -> tuple[mue.Plan, LanguageModel]:
    numbers = {"width": 64, "expert": 8, "layers": 2, "head_dim": 16, "sequence": 16, "vocab": 64}
    target = mue.MoE.parse("8e2a", **numbers, router=router, router_settings=settings)
    plan = mue.transfer(BASE, target, TUNED)
    model = LanguageModel(plan.target, plan.multipliers)
    plan.init_(model, seed=1)
    return plan, model


def uneven(model: LanguageModel) -> None:
    """The weights of every second token are a tenth larger, those of the others a tenth smaller."""
    for block in model.blocks:
        router = block.moe.router  # type: ignore[union-attr]

        def forward(x_TD: Any, *more: Any, old: Any = router.forward, **named: Any) -> Any:
            out = old(x_TD, *more, **named)
            return replace(out, weight_P=out.weight_P * (0.9 + 0.2 * (out.token_P % 2)))

        router.forward = forward


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "alone"])
@pytest.mark.parametrize("router", SUMMING)
def test_sums_of_routers_by_mass_are_measured(router: str, batch: bool) -> None:
    plan, model = built(router, SUMMING[router])
    given = (TOKENS, TOKENS) if batch else None
    assert mue.check(model, plan, given, only=("gates",)).ok
    uneven(model)
    found = mue.check(model, plan, given, raises=False, only=("gates",))
    assert any("sum to one number for every token" in f.expected for f in found.failures), found
    plan, model = built("top-p", {})  # the control: nobody promised anything of raw ones
    uneven(model)
    assert mue.check(model, plan, given, only=("gates",)).ok


@pytest.mark.parametrize("router", SUMMING)
def test_their_scale_is_read_to_the_tolerance_of_other_routers(router: str) -> None:
    """Nothing is left open for moments that are another model's: the sum is exact."""
    plan, model = built(router, SUMMING[router])
    assert mue.check(model, plan, (TOKENS, TOKENS), only=("multipliers",)).ok
    model.blocks[1].moe.router.route_scale *= 1.15  # type: ignore[union-attr]
    found = mue.check(model, plan, (TOKENS, TOKENS), raises=False, only=("multipliers",))
    assert any("routed sum" in f.where for f in found.failures), found


def test_a_block_says_whether_its_sums_are_exact() -> None:
    block = mue.Block(layers=1, experts=8, active=2, expert=8)
    raw = replace(block, router="top-p")
    assert block.exact_sum and not raw.exact_sum and not mue.Block(layers=1, ffn=8).exact_sum
    assert not replace(block, gates="measured", gate_moments=(0.5, 0.2)).exact_sum
    assert replace(block, gates="measured", gate_moments=(1.0, 0.6)).exact_sum  # measured, and one


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_is_checked_by_shapes_alone(router: str) -> None:
    """What layers share is nowhere but on the meta device, too; a route scale that is not the plan's is seen where sums are exact."""
    settings = {"n_group": 4, "topk_group": 2} if router == "group-limited" else {}
    numbers = {"width": 64, "expert": 8, "layers": 2, "head_dim": 16, "sequence": 16, "vocab": 64}
    notation = "8e1a" if router == "thor" else "8e2a"
    plan = mue.transfer(BASE, mue.MoE.parse(notation, **numbers, router=router, router_settings=settings), TUNED)
    with torch.device("meta"):
        model = LanguageModel(plan.target, plan.multipliers)
    found = mue.check(model, plan, only=("gates",), raises=False)
    assert not found.failures, found
    if plan.target.blocks[0].exact_sum and router != "hash":  # which reads tokens
        model.blocks[1].moe.router.route_scale *= 1.5  # type: ignore[union-attr]
        assert mue.check(model, plan, only=("gates",), raises=False).failures
