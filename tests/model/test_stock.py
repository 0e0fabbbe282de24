"""Stock models whose routers are not the planned ones are refused wherever the plan would be applied."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mue
from mue.fold import fold
from mue.layouts.inspect import inspect, measure_gates
from mue.layouts.transformers.configs import build
from mue.shapes import Transformer
from support.stock_models import TUNED, tiny

QWEN = {"num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True}


def plan_for(shape: Transformer) -> mue.Plan:
    return fold(mue.transfer(mue.Dense(32, 32, 1, head_dim=16), shape, TUNED))


def shape_of(config: Any, **changes: Any) -> Transformer:
    shape = inspect(config).shape
    assert isinstance(shape, mue.MoE)
    return mue.MoE(**{**{k: v for k, v in shape.to_dict().items() if k != "kind"}, **changes})


WRONG = {
    "gates that sum to a/N": ({"norm_topk_prob": False}, {}, "set norm_topk_prob = true"),
    "other scores": (
        {},
        {"router": "sigmoid"},
        "score with softmax, the plan's with sigmoid: plan with router = 'softmax'",
    ),
    "more active": ({}, {"active": 4}, "choose 2 experts per token, the plan has 4 active"),
    "fewer active": ({"num_experts_per_tok": 4}, {}, "choose 4 experts per token, the plan has 2 active"),
    "measured where they sum to one": (
        {},
        {"gates": "measured", "gate_moments": (0.5, 0.2), "normalize": False},
        r"E\[Σw\] = 0\.5, and the model's sum to 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_routers_that_are_not_the_planned_ones_are_refused(name: str) -> None:
    settings, changes, message = WRONG[name]
    plan = plan_for(shape_of(tiny("qwen3_moe", **QWEN), **changes))
    config = tiny("qwen3_moe", **{**QWEN, **settings})
    model = build(config)
    for apply in (plan.init_, plan.param_groups, lambda m: plan.export("transformers", config)):
        with pytest.raises(ValueError, match=message):
            apply(model)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "glm4_moe"])
def test_routers_as_planned_are_accepted(family: str) -> None:
    config = tiny(family, **({"norm_topk_prob": True} if family in ("qwen3_moe", "olmoe") else {}))
    if hasattr(config, "routed_scaling_factor"):
        config.routed_scaling_factor = 1.0
    shape = inspect(config).shape
    assert shape is not None
    plan_for(shape).init_(build(config))


def test_measured_gates_are_accepted_as_they_are() -> None:
    config = tiny("qwen3_moe", **{**QWEN, "norm_topk_prob": False})
    moments = measure_gates(config)
    shape = inspect(config, gate_moments=(moments.m1, moments.m2)).shape
    assert shape is not None and shape.blocks[0].gates == "measured"
    plan_for(shape).init_(build(config))


def test_one_expert_of_weight_one_has_no_score_to_compare() -> None:
    config = tiny("qwen3_moe", **{**QWEN, "num_experts_per_tok": 1})
    plan_for(shape_of(config, router="sigmoid")).init_(build(config))


def test_an_adapter_beside_a_stock_model_is_left_alone() -> None:
    config = tiny("qwen3_moe", **QWEN)
    plan = plan_for(shape_of(config))
    model = build(config)

    class Adapted(type(model)):  # type: ignore[misc]
        """The family with a matrix that nothing plans, in every layer."""

        layout_rows = (mue.Layout("model.layers.*.adapter.**", "unplanned"),)

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.adapter = torch.nn.Linear(config.hidden_size, 4)

        def forward(self, *args: Any, **more: Any) -> Any:
            for layer in self.model.layers:
                layer.adapter(torch.ones(config.hidden_size))
            return super().forward(*args, **more)

    adapted = Adapted(config)
    before = adapted.model.layers[0].adapter.weight.detach().clone()
    plan.init_(adapted)
    assert torch.equal(adapted.model.layers[0].adapter.weight, before)
    with pytest.warns(UserWarning, match=r"model\.layers\.0\.adapter\.weight and 3 more are unplanned"):
        plan.param_groups(adapted)
