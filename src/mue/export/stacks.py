"""Parameters of training stacks' own models: role and axes of every tensor, as their code multiplies by it.

Written from torchtitan 0.3.0, megatron-core 0.16.1 and ai2-olmo-core 3.0.0; `make stacks` holds the tables against the
installed packages. The first ``*`` of a pattern is the layer, a second one the expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from mue.layouts.layout import Layout
from mue.rules.roles import ROLES

OI, IO, EXPERTS, V = ("out", "in"), ("in", "out"), ("expert", "out", "in"), ("vector",)
QKV = ("attention_q", "attention_k", "attention_v")
KV = QKV[1:]


@dataclass(frozen=True)
class StackModel:
    """One kind of model of a stack.

    Attributes:
        what: its configuration in the stack's words.
        rows: parameters of every layer whose role the layer has; outside the layers, of the model.
        dense, moe: parameters of dense layers only, and of those with experts only.
    """

    what: str
    rows: tuple[Layout, ...]
    dense: tuple[Layout, ...] = ()
    moe: tuple[Layout, ...] = ()


@dataclass(frozen=True)
class Stack:
    """A training stack.

    Attributes:
        models: by name, the default first.
        others: rows that a model built by it may have besides.
        routers: those of mue.shapes.routers that its code has.
    """

    models: Mapping[str, StackModel]
    others: tuple[Layout, ...] = ()
    routers: tuple[str, ...] = ("sigmoid", "softmax")

    @property
    def every(self) -> list[Layout]:
        """All rows, in the order in which a name is looked up."""
        return [row for m in self.models.values() for row in (*m.rows, *m.dense, *m.moe)] + list(self.others)


def _row(pattern: str, role: str | tuple[str, ...], axes: tuple[str, ...] = OI) -> Layout:
    parts = role if isinstance(role, tuple) else ()
    return Layout(pattern, parts[0] if parts else str(role), axes, parts)


def _gated(prefix: str, kind: str, suffix: str = ".weight") -> list[Layout]:
    """w1 is the gate, w3 the up, w2 the down projection, as in Llama's reference code."""
    parts = {"w1": "gate", "w3": "up", "w2": "down"}
    return [_row(f"{prefix}.{w}{suffix}", f"{kind}_{part}") for w, part in parts.items()]


def _norms(prefix: str, names: Iterable[str], role: str = "norm") -> list[Layout]:
    return [_row(f"{prefix}.{name}.weight", role, V) for name in names]


def _biases(prefix: str, names: Iterable[str]) -> list[Layout]:
    return [_row(f"{prefix}.{name}.bias", "bias", V) for name in names]


# ---- torchtitan --------------------------------------------------------------------------------------------------

_T = "layers.*"
_TITAN = (
    _row("tok_embeddings.weight", "embedding", IO),
    _row(f"{_T}.attention.qkv_linear.wqkv.weight", QKV),
    _row(f"{_T}.attention.wo.weight", "attention_o"),
    *_norms(_T, ("attention_norm", "ffn_norm")),
    *_gated(f"{_T}.feed_forward", "ffn"),
    _row(f"{_T}.moe.router.gate.weight", "router"),
    _row(f"{_T}.moe.routed_experts.inner_experts.w1_EFD", "expert_gate", EXPERTS),
    _row(f"{_T}.moe.routed_experts.inner_experts.w3_EFD", "expert_up", EXPERTS),
    _row(f"{_T}.moe.routed_experts.inner_experts.w2_EDF", "expert_down", EXPERTS),
    *_gated(f"{_T}.moe.shared_experts", "shared"),
    _row("norm.weight", "final_norm", V),
    _row("lm_head.weight", "head"),
)
_TITAN_QK = tuple(_norms(f"{_T}.attention", ("q_norm", "k_norm"), "qk_norm"))
TORCHTITAN = Stack(
    {
        "qwen3": StackModel("fused q, k and v, norms of queries and keys", _TITAN + _TITAN_QK),
        "llama3": StackModel("fused q, k and v, no norms of queries and keys", _TITAN),
    },
    others=(
        *(_row(f"{_T}.attention.qkv_linear.w{x}.weight", f"attention_{x}") for x in "qkv"),
        *_biases(f"{_T}.attention.qkv_linear", ("wqkv", "wq", "wk", "wv")),
        # latent attention
        *(_row(f"{_T}.attention.{w}.weight", "attention_q") for w in ("wq", "wq_a", "wq_b")),
        *(_row(f"{_T}.attention.{w}.weight", KV) for w in ("wkv_a", "wkv_b")),
        *_norms(f"{_T}.attention", ("q_norm", "kv_norm")),
    ),
)

# ---- Megatron-Core -----------------------------------------------------------------------------------------------

_M = "decoder.layers.*"
_EXPERT_UP = ("expert_gate", "expert_up")
_MEGATRON = (
    _row("embedding.word_embeddings.weight", "embedding", IO),
    _row(f"{_M}.self_attention.linear_qkv.weight", QKV),
    *_norms(f"{_M}.self_attention", ("q_layernorm", "k_layernorm"), "qk_norm"),
    _row(f"{_M}.self_attention.linear_proj.weight", "attention_o"),
    _row(f"{_M}.mlp.linear_fc1.weight", ("ffn_gate", "ffn_up")),
    _row(f"{_M}.mlp.linear_fc2.weight", "ffn_down"),
    _row(f"{_M}.mlp.router.weight", "router"),
    _row(f"{_M}.mlp.shared_experts.linear_fc1.weight", ("shared_gate", "shared_up")),
    _row(f"{_M}.mlp.shared_experts.linear_fc2.weight", "shared_down"),
    _row("decoder.final_layernorm.weight", "final_norm", V),
    _row("output_layer.weight", "head"),
)
_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_LAYERNORMS = ("input_layernorm", "pre_mlp_layernorm", "self_attention.q_layernorm", "self_attention.k_layernorm")
MEGATRON = Stack(
    {
        "te": StackModel(
            "Transformer Engine's layers: norms inside the linear layers after them, grouped experts",
            (*_MEGATRON, _row(f"{_M}.self_attention.linear_qkv.layer_norm_weight", "norm", V)),
            dense=(_row(f"{_M}.mlp.linear_fc1.layer_norm_weight", "norm", V),),
            moe=(
                *_norms(_M, ("pre_mlp_layernorm",)),
                _row(f"{_M}.mlp.experts.linear_fc1.weight*", _EXPERT_UP),
                _row(f"{_M}.mlp.experts.linear_fc2.weight*", "expert_down"),
            ),
        ),
        "local": StackModel(
            "Megatron's own layers (get_gpt_layer_local_spec), experts one by one",
            (*_MEGATRON, *_norms(_M, ("input_layernorm", "pre_mlp_layernorm"))),
            moe=(
                _row(f"{_M}.mlp.experts.local_experts.*.linear_fc1.weight", _EXPERT_UP),
                _row(f"{_M}.mlp.experts.local_experts.*.linear_fc2.weight", "expert_down"),
            ),
        ),
    },
    others=(
        _row("embedding.position_embeddings.weight", "embedding", IO),
        _row(f"{_M}.mlp.shared_experts.gate_weight", "router"),
        *_biases(_M, (*_LINEARS, *_LAYERNORMS)),
        *(_row(f"{_M}.{x}.layer_norm_bias", "bias", V) for x in ("self_attention.linear_qkv", "mlp.linear_fc1")),
        *_biases(_M, (f"mlp.experts.local_experts.*.linear_fc{i}" for i in (1, 2))),
        _row("decoder.final_layernorm.bias", "bias", V),
        # GroupedMLP: viewed as (experts, in, out) and as (experts, in, out)
        _row(f"{_M}.mlp.experts.weight1", _EXPERT_UP, ("in", "expert*out")),
        _row(f"{_M}.mlp.experts.weight2", "expert_down", ("expert*in", "out")),
        # latent attention
        *(_row(f"{_M}.self_attention.linear_q_{w}.weight", "attention_q") for w in ("proj", "down_proj", "up_proj")),
        *(_row(f"{_M}.self_attention.linear_kv_{w}.weight", KV) for w in ("down_proj", "up_proj")),
        *_norms(f"{_M}.self_attention", ("q_layernorm", "kv_layernorm")),
        *(_row(f"{_M}.self_attention.linear_{x}_up_proj.layer_norm_weight", "norm", V) for x in ("q", "kv")),
    ),
)

# ---- OLMo-core ---------------------------------------------------------------------------------------------------

_O = "blocks.*"
_OLMO_NORMS = tuple(_norms(_O, ("attention_norm", "feed_forward_norm")))
_OLMO = (
    _row("embeddings.weight", "embedding", IO),
    *(_row(f"{_O}.attention.w_{x}.weight", f"attention_{x}") for x in "qkv"),
    _row(f"{_O}.attention.w_out.weight", "attention_o"),
    *_norms(f"{_O}.attention", ("q_norm", "k_norm"), "qk_norm"),
    *_OLMO_NORMS,
    _row("lm_head.norm.weight", "final_norm", V),
    _row("lm_head.w_out.weight", "head"),
)
_OLMO_MOE = (
    *_gated(f"{_O}.feed_forward", "ffn"),
    *_gated(f"{_O}.feed_forward_moe.shared_mlp", "shared"),
    _row(f"{_O}.feed_forward_moe.router.weight", "router", ("expert*in",)),
)


def _olmo_experts(inwards: tuple[str, ...]) -> tuple[Layout, ...]:
    mlp = f"{_O}.feed_forward_moe.experts.mlp"
    return (
        _row(f"{mlp}.w1", "expert_gate", inwards),
        _row(f"{mlp}.w3", "expert_up", inwards),
        _row(f"{mlp}.w2", "expert_down", ("expert*in", "out")),
    )


OLMO = Stack(
    {
        "moe": StackModel(
            "MoEConfig(name=default), queries and keys normed by head",
            _OLMO + _OLMO_MOE + _olmo_experts(("expert*in", "out")),
        ),
        "moe_dropless": StackModel(
            "MoEConfig(name=dropless), queries and keys normed by head",
            _OLMO + _OLMO_MOE + _olmo_experts(("expert*out", "in")),
        ),
        "moe_fused_v2": StackModel(
            "OLMoDDPModelConfig with use_pre_norm, queries and keys normed by head",
            (
                *_OLMO,
                _row(f"{_O}.routed_experts_router.weight", "router", ("expert*in",)),
                _row(f"{_O}.routed_experts.w_up_gate", ("expert_up", "expert_gate"), EXPERTS),
                _row(f"{_O}.routed_experts.w_down", "expert_down", ("expert", "in", "out")),
                _row(f"{_O}.shared_experts.w_up_gate", ("shared_up", "shared_gate"), IO),
                _row(f"{_O}.shared_experts.w_down", "shared_down", ("expert", "in", "out")),
            ),
        ),
    },
    others=(
        *_norms(f"{_O}.attention", ("q_norm", "k_norm")),  # over all heads together: a gain like any other
        *_biases(_O, (*(f"attention.w_{x}" for x in ("q", "k", "v", "out")), "attention_norm", "feed_forward_norm")),
        *_biases(f"{_O}.feed_forward", ("w1", "w2", "w3")),
        *_biases(f"{_O}.feed_forward_moe.shared_mlp", ("w1", "w2", "w3")),
        *_biases("lm_head", ("norm", "w_out")),
        _row(f"{_O}.shared_experts_router.weight", "router", ("in",)),  # the gate of a shared expert
    ),
)


def norms_last(model: nn.Module) -> bool:
    """Whether OLMo-core's blocks norm the end of each branch, not its beginning.

    Raises:
        ValueError: blocks that do something else.
    """
    blocks = [m for m in model.modules() if type(m).__name__.endswith("TransformerBlock")]
    for block in blocks:
        name = type(block).__name__
        if re.search("PeriNorm|Normalized|Scaled|Hybrid", name) or getattr(block, "use_peri_norm", False):
            raise ValueError(f"{name} scales its branches in a way that no fold is known for: use the default block")
    return any("Reordered" in type(b).__name__ or not getattr(b, "use_pre_norm", True) for b in blocks)


def post_normed(rows: Iterable[Layout]) -> list[Layout]:
    """OLMo-core's rows where attention_norm and feed_forward_norm come last in their branch."""
    rows = list(rows)
    ends = {"attention_norm": "o", "feed_forward_norm": "down"}
    return [
        replace(
            row,
            after=tuple(
                dict.fromkeys(r.pattern for r in rows if ROLES[r.role].part == ends[row.pattern.split(".")[2]])
            ),
        )
        if row in _OLMO_NORMS
        else row
        for row in rows
    ]


STACKS: Mapping[str, Stack] = {"torchtitan": TORCHTITAN, "megatron": MEGATRON, "olmo-core": OLMO}
