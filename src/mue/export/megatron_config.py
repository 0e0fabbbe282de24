"""A plan's shape as arguments of Megatron-Core's TransformerConfig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mue.plan.plan import PlanData
from mue.shapes.block import Block


def transformer_config(plan: PlanData) -> dict[str, str]:
    """TransformerConfig's arguments, as code.

    Raises:
        ValueError: routers that Megatron-Core does not have; layers that differ in more than dense or with experts.
    """
    t = plan.target
    dense = _only(plan, "dense", [block for block in t.blocks if not block.is_moe])
    moe = _only(plan, "MoE", [block for block in t.blocks if block.is_moe])
    shape: dict[str, object] = {
        "num_layers": t.layers,
        "hidden_size": t.width,
        "num_attention_heads": t.num_heads,
        "num_query_groups": t.num_kv_heads,
        "kv_channels": t.head_dim,
        "softmax_scale": plan.attention_scale,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": t.gated,
        "ffn_hidden_size": dense.ffn if dense else moe.expert if moe else None,
    }
    code = {
        **{key: repr(value) for key, value in shape.items()},
        "activation_func": f"F.{'silu' if t.gated else 'gelu'}",
    }
    return code if moe is None else {**code, **{key: repr(value) for key, value in _experts(plan, moe).items()}}


def _experts(plan: PlanData, moe: Block) -> dict[str, object]:
    """TransformerConfig's arguments for experts; R is its top-k scaling factor, so it stays in the model."""
    if moe.router == "sigmoid" and (moe.active == 1 or not moe.normalize):
        raise ValueError(
            "Megatron-Core divides sigmoid scores by their sum, unless one expert is active: plan with softmax, or with"
            " normalised gates and at least two active experts"
        )
    if not moe.experts:
        raise ValueError("Megatron-Core has no layers with shared experts alone: plan them as dense ones (ffn)")
    freq = [int(block.is_moe) for block in plan.target.per_layer]
    shared = {"moe_shared_expert_intermediate_size": moe.shared_width} if moe.shared_experts else {}
    return {
        "moe_layer_freq": freq,
        "num_moe_experts": moe.experts,
        "moe_ffn_hidden_size": moe.expert,
        **shared,
        "moe_router_topk": moe.active,
        "moe_router_score_function": moe.router,
        "moe_router_pre_softmax": not moe.normalize,
        "moe_router_topk_scaling_factor": plan.multipliers.route[freq.index(1)],
    }


def _only(plan: PlanData, kind: str, blocks: Sequence[Block]) -> Block | None:
    """The one kind of block among them, whatever the number of layers."""
    kinds = {replace(block, layers=1) for block in blocks}
    if len(kinds) > 1:
        raise ValueError(
            f"the {kind} layers of {plan.target.name} differ, and Megatron-Core's TransformerConfig has one kind of them:"
            " plan with equal ones, or use another stack"
        )
    return kinds.pop() if kinds else None
