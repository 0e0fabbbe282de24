"""Sandwich norms: found without names, and folded training equals a forward pass that really multiplies after them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers", reason="model families need the hf extra")

import torch
from torch import nn

import mue
from mue.fold import coefficients, fold
from mue.layouts.layout import Layout
from mue.layouts.of_model import placed
from mue.layouts.transformers.configs import default_config
from mue.layouts.transformers.describe import describe_config
from mue.model.apply import init_, param_groups
from support.stock_models import planned, stock, tiny, train

torch.set_num_threads(1)
O, DOWN = "model.layers.*.self_attn.o_proj.weight", "model.layers.*.mlp.down_proj.weight"


def ends(family: str) -> dict[str, tuple[str, ...]]:
    found = describe_config(default_config(family))
    assert not found.cancelled
    return {f.pattern.split(".")[3]: f.row.after for f in found.patterns if f.row and f.row.after}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("olmo2", {"post_attention_layernorm": (O,), "post_feedforward_layernorm": (DOWN,)}),
        ("gemma3_text", {"post_attention_layernorm": (O,), "post_feedforward_layernorm": (DOWN,)}),
        # Each part has a norm of its own, and their sum has one more: that one scales the branch.
        (
            "gemma4_text",
            {
                "post_attention_layernorm": (O,),
                "post_feedforward_layernorm": ("model.layers.*.experts.down_proj", DOWN),
            },
        ),
        ("llama", {}),  # the same name, post_attention_layernorm, for a norm that reads the residual stream
    ],
)
def test_norms_that_end_a_branch_are_told_from_those_that_begin_one(
    family: str, expected: dict[str, tuple[str, ...]]
) -> None:
    assert ends(family) == expected


def test_a_norm_without_a_gain_leaves_the_residual_multiplier_no_place() -> None:
    from mue.layouts.observe.post_norms import post_norms

    class Layer(nn.Module):
        def __init__(self, gain: bool) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8, elementwise_affine=gain)
            self.down = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(self.down(x))

    rows = {"layers.*.down.weight": Layout("layers.*.down.weight", "ffn_down", ("out", "in"))}
    rows["layers.*.down.bias"] = Layout("layers.*.down.bias", "bias", ("vector",), start=0.0)
    with_gain = {**rows, "layers.*.norm.weight": Layout("layers.*.norm.weight", "norm", ("vector",), start=1.0)}
    for gain, table in ((False, rows), (True, with_gain)):
        model = nn.Module()
        model.layers = nn.ModuleList([Layer(gain)])
        found = post_norms(model, lambda m: m.layers[0](torch.randn(4, 8)), table)  # type: ignore[index,operator]
        expected = {"layers.*.norm.weight": ("layers.*.down.weight",)} if gain else {}
        assert found == (expected, frozenset() if gain else frozenset({"layers.*.down.weight"}))


def multiplied(model: nn.Module, plan: mue.Plan, folded: mue.Plan) -> list[dict[str, Any]]:
    """The same model with multipliers in its forward pass: A·R before the post norms, the residual one after them."""

    def times(factor: float) -> Any:
        return lambda module, args, out: (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    for i, layer in enumerate(model.model.layers):  # type: ignore[union-attr,arg-type]
        m = plan.multipliers
        assert len(set(m.route)) == 1
        layer.mlp.register_forward_hook(times(m.output[i] * m.route[i]))
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.register_forward_hook(times(m.residual))
    model.get_output_embeddings().register_forward_hook(times(plan.head_multiplier))  # type: ignore[operator]
    groups = []
    with torch.no_grad():
        by_name = {p.name: p for p in placed(model)}
        for parameter, c in coefficients(folded, model).items():
            (p,) = (p for p in by_name.values() if p.parameter is parameter)
            parameter.copy_((parameter + p.gain_offset) / c - p.gain_offset)
            v = plan.role(p.role, p.layer).values
            groups.append({"params": [parameter], "lr": v.lr, "weight_decay": v.weight_decay, "eps": v.eps})
    return [{**g, "betas": plan.betas} for g in groups]


OWN = {"flex_olmo": {"norm_topk_prob": True}, "gemma3_text": {"query_pre_attn_scalar": 16}}
BOUND = {"gemma3_text": 1e-6}  # its norms compute in float32 whatever the model's type


@pytest.mark.parametrize("family", ["olmo2", "gemma3_text", "flex_olmo"])
def test_folded_training_is_training_with_multipliers_in_the_forward_pass(family: str) -> None:
    config = tiny(family, **OWN.get(family, {}))
    plan = planned(config)
    assert plan.residual_multiplier == 0.5 and plan.output_multiplier not in (None, 1.0)
    folded = fold(plan)
    mine, theirs = stock(config), stock(config)
    init_(folded, mine)
    theirs.load_state_dict(mine.state_dict())
    moved = {p.role for p in placed(mine) if coefficients(folded, mine)[p.parameter] == pytest.approx(0.5)}
    assert "norm" in moved
    steps = 30
    train(mine, param_groups(folded, mine), steps)
    c = coefficients(folded, mine)
    train(theirs, multiplied(theirs, plan, folded), steps)
    for p, q in zip(placed(mine), placed(theirs), strict=True):
        effective = (q.parameter + p.gain_offset) * c[p.parameter] - p.gain_offset
        assert float((p.parameter - effective).detach().abs().max()) < BOUND.get(family, 1e-10), p.name


def test_control_the_multiplier_in_the_projection_does_nothing() -> None:
    config = tiny("olmo2")
    model = stock(config)
    x = torch.arange(3, 20)[None]
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.mlp.down_proj.weight.mul_(1e6)  # away from the norm's epsilon
        before = model(input_ids=x).logits
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.mlp.down_proj.weight.mul_(2)  # type: ignore[union-attr]
        assert torch.allclose(model(input_ids=x).logits, before, rtol=1e-2, atol=1e-3)
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.post_feedforward_layernorm.weight.mul_(2)  # type: ignore[union-attr]
        assert not torch.allclose(model(input_ids=x).logits, before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["ernie4_5_moe", "glm4_moe"])
def test_families_without_post_norms_fold_at_their_tiny_size(family: str) -> None:
    config = tiny(family)
    model = stock(config)
    plan = planned(config)
    assert plan.residual_multiplier != 1
    scale = {"routed_scaling_factor": 1.0} if hasattr(config, "routed_scaling_factor") else {}
    model = stock(tiny(family, **scale))
    assert len(param_groups(fold(plan), model)) > 3
