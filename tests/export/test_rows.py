"""Rows of models whose names are not simply blocks and numbers: stages, what is left alone, starts at zero, the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import mue
from mue.fold import fold
from mue.lab.models.language import LanguageModel
from mue.layouts.layout import Layout

TUNED = mue.HParams(lr=4e-3, weight_decay=0.1, init_std=0.05)
THIRDS = {"first_third": {"ffn_up": {"lr_times": 4.0}}, "last_third": {"ffn_up": {"lr_times": 0.25}}}


def plan_of(layers: int = 6, **tuned: Any) -> mue.Plan:
    base, target = (mue.Dense(width=d, ffn=d, layers=layers, head_dim=16) for d in (32, 64))
    return fold(mue.transfer(base, target, TUNED.replace(**tuned)))


class Own(LanguageModel):
    """The planned model with blocks in stages of two, an adapter beside them, and a head that starts at zero."""

    def __init__(self, plan: mue.Plan) -> None:
        super().__init__(plan.target, plan.multipliers)
        blocks = list(self.blocks)
        self.blocks = nn.ModuleList(nn.ModuleList(blocks[i : i + 2]) for i in range(0, len(blocks), 2))
        self.adapter = nn.Sequential(nn.Linear(4, 4, bias=False))

    def layout(self) -> Sequence[Layout]:
        rows = [replace(r, pattern=r.pattern.replace("blocks.*", "blocks.{stage}.{layer}")) for r in super().layout()]
        rows = [replace(r, start=0.0) if r.role == "head" else r for r in rows]
        return [*rows, Layout("adapter.**", "unplanned")]


@pytest.fixture
def written() -> tuple[mue.Plan, Own, dict[str, Any]]:
    plan = plan_of(roles=THIRDS)
    model = Own(plan)
    made: dict[str, Any] = {}
    exec(plan.export("torch", model), made)
    return plan, model, made


def test_a_file_has_the_plans_groups_in_every_stage(written: tuple[mue.Plan, Own, dict[str, Any]]) -> None:
    plan, model, made = written
    with pytest.warns(UserWarning, match=r"adapter\.0\.weight is unplanned"):
        groups = plan.param_groups(model)
    want = {id(p): (g["lr"], g["weight_decay"], g["eps"]) for g in groups for p in g["params"]}
    have = {id(p): (g["lr"], g["weight_decay"], g["eps"]) for g in made["param_groups"](model) for p in g["params"]}
    assert have == want and id(model.adapter[0].weight) not in have
    assert "groups of what the model leaves unplanned (adapter.**)" in made["__doc__"]


def test_a_file_draws_what_the_plan_draws(written: tuple[mue.Plan, Own, dict[str, Any]]) -> None:
    plan, model, made = written
    before = model.adapter[0].weight.detach().clone()
    made["init_"](model)
    assert torch.equal(model.adapter[0].weight, before) and not model.head.weight.any()
    assert mue.check(model, plan, only=["init"]).ok
    meta = Own(plan).to("meta")
    with pytest.raises(ValueError, match=r"meta device has no values to draw: model\.to_empty"):
        made["init_"](meta)


@pytest.mark.parametrize("stack", ["automodel", "torchtitan", "olmo-core"])
def test_a_stack_that_trains_everything_does_not_take_what_is_unplanned(stack: str) -> None:
    model = Own(plan_of())
    with pytest.raises(ValueError, match=r"adapter\.0\.weight is unplanned and trained"):
        plan_of().export(stack, model)
    model.adapter.requires_grad_(False)
    assert "blocks" in plan_of().export(stack, model)


def test_a_tied_model_that_describes_itself_is_exported_to_any_stack() -> None:
    """Its head's row matches the embedding's tensor, under a second name."""
    base, target = (mue.Dense(width=d, ffn=d, layers=2, head_dim=16, tied=True) for d in (32, 64))
    plan = fold(mue.transfer(base, target, TUNED))

    class Both(LanguageModel):
        def __init__(self) -> None:
            super().__init__(plan.target, plan.multipliers)
            self.head = nn.Linear(64, 256, bias=False)
            self.head.weight = self.embedding.weight

        def layout(self) -> Sequence[Layout]:
            return [*super().layout(), Layout("head.weight", "head", ("out", "in"))]

    for stack in ("torch", "torchtitan", "olmo-core"):
        assert "embedding" in plan.export(stack, Both())


def test_a_model_that_is_not_megatrons_is_told_so() -> None:
    plan = plan_of()
    with pytest.raises(
        ValueError, match="no matrix of this model is one that Megatron-Core draws by its output_layer_init_method"
    ):
        plan.export("megatron", LanguageModel(plan.target, plan.multipliers))
