"""Tiny models of the training stacks, built by the stacks' own code; and what of these packages a laptop cannot import.

Two modules are stood in for: torchtitan's file of Triton kernels and OLMo-core's downloads from clouds. Nothing here calls them.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Sequence
from functools import cache, partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

import mue
from mue.shapes import Transformer

STOOD_IN = ("torchtitan.distributed.minimal_async_ep.kernels", "cached_path", "cached_path.schemes")


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class _StandIns(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name in STOOD_IN else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def need(name: str) -> Any:
    """A stack's module: where `make stacks` says that it is installed it must import, elsewhere the test is skipped."""
    if not any(isinstance(finder, _StandIns) for finder in sys.meta_path):
        sys.meta_path.insert(0, _StandIns())
    if os.environ.get("MUE_STACKS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason="installed by `make stacks`", exc_type=ModuleNotFoundError)


# ---- torchtitan --------------------------------------------------------------------------------------------------


def titan_config(target: Transformer, *, fuse_qkv: bool = True, qk_norm: bool = True) -> Any:
    """What a recipe is given, as far as it looks: a Trainer.Config with a model of torchtitan's own (qwen3, or llama3)."""
    need("torchtitan.models.qwen3")
    from torchtitan.models.common import CosSinRoPE, Embedding, Linear, config_utils
    from torchtitan.models.common.nn_modules import RMSNorm
    from torchtitan.models.common.param_init import skip_param_init
    from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock

    t, linear = target, {"weight": partial(nn.init.normal_, std=0.5), "bias": nn.init.zeros_}

    def norm(size: int) -> Any:
        return RMSNorm.Config(normalized_shape=size, param_init={"weight": nn.init.ones_})

    def ffn(width: int) -> Any:
        return config_utils.make_ffn_config(dim=t.width, hidden_dim=width, w1_param_init=linear, w2w3_param_init=linear)

    def moe(b: mue.Block) -> Any:
        experts = dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), linear["weight"])
        sizes = {"dim": t.width, "num_experts": b.experts, "top_k": b.active}
        return config_utils.make_moe_config(
            num_experts=b.experts,
            router=config_utils.make_router_config(
                **sizes, gate_param_init=linear, score_func=b.router, route_norm=b.normalize
            ),
            routed_experts=config_utils.make_routed_experts_config(
                **sizes, hidden_dim=b.expert, param_init=experts, comm_backend="standard"
            ),
            shared_experts=ffn(b.shared_width) if b.shared_experts else None,
        )

    def block(b: mue.Block) -> Any:
        attention = config_utils.make_gqa_config(
            dim=t.width,
            n_heads=t.num_heads,
            n_kv_heads=t.num_kv_heads,
            head_dim=t.head_dim,
            wqkv_param_init=linear,
            wo_param_init=linear,
            inner_attention=config_utils.get_attention_config("flex"),
            fuse_qkv=fuse_qkv,
            rope=CosSinRoPE.Config(dim=t.head_dim, max_seq_len=16, theta=1e4),
            qk_norm=norm(t.head_dim) if qk_norm else None,
        )
        parts = {"moe": moe(b)} if b.is_moe else {"feed_forward": ffn(b.ffn or 0)}
        return Qwen3TransformerBlock.Config(
            attention_norm=norm(t.width), ffn_norm=norm(t.width), attention=attention, **parts
        )

    model = Qwen3Model.Config(
        vocab_size=t.vocab,
        dim=t.width,
        norm=norm(t.width),
        enable_weight_tying=t.tied,
        tok_embeddings=Embedding.Config(
            num_embeddings=t.vocab,
            embedding_dim=t.width,
            param_init={"weight": skip_param_init if t.tied else linear["weight"]},
        ),
        lm_head=Linear.Config(in_features=t.width, out_features=t.vocab, param_init=linear),
        layers=[block(b) for b in t.per_layer],
    )
    return types.SimpleNamespace(model_spec=types.SimpleNamespace(model=model), optimizer=None)


def titan_latent_config(target: Transformer, q_rank: int, kv_rank: int) -> Any:
    """torchtitan's DeepSeek-V3: latent attention, dense layers first, then experts with one shared."""
    need("torchtitan.models.deepseek_v3")
    from torchtitan.models import deepseek_v3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear
    from torchtitan.models.common.nn_modules import RMSNorm
    from torchtitan.models.deepseek_v3.model import DeepSeekV3Model

    t, ones, half = target, {"weight": nn.init.ones_, "bias": nn.init.zeros_}, target.head_dim // 2
    dense, moe = t.blocks
    layers = deepseek_v3._build_dsv3_layers(
        n_layers=t.layers,
        n_dense_layers=dense.layers,
        dim=t.width,
        n_heads=t.num_heads,
        q_lora_rank=q_rank,
        kv_lora_rank=kv_rank,
        qk_nope_head_dim=half,
        qk_rope_head_dim=half,
        v_head_dim=t.head_dim,
        mscale=1.0,
        dense_hidden_dim=dense.ffn,
        moe_hidden_dim=moe.expert,
        num_experts=moe.experts,
        num_shared_experts=moe.shared_experts,
        router_top_k=moe.active,
        router_score_func=moe.router,
        router_route_norm=True,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(dim=half, max_seq_len=16, theta=1e4),
    )
    model = DeepSeekV3Model.Config(
        vocab_size=t.vocab,
        dim=t.width,
        norm=RMSNorm.Config(normalized_shape=t.width, param_init=ones),
        tok_embeddings=Embedding.Config(num_embeddings=t.vocab, embedding_dim=t.width, param_init=ones),
        lm_head=Linear.Config(in_features=t.width, out_features=t.vocab, param_init=ones),
        layers=layers,
    )
    return types.SimpleNamespace(model_spec=types.SimpleNamespace(model=model), optimizer=None)


# ---- Megatron-Core -----------------------------------------------------------------------------------------------


@cache
def megatron() -> None:
    """One process is the whole world."""
    need("megatron.core.models.gpt")
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def megatron_model(target: Transformer, settings: dict[str, Any]) -> nn.Module:
    """GPTModel of a TransformerConfig with these settings, in Megatron's own layers."""
    megatron()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(**settings, use_cpu_initialization=True)
    if config.num_moe_experts is None:
        config.moe_layer_freq = [0] * config.num_layers
    made: nn.Module = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),
        vocab_size=target.vocab,
        max_sequence_length=16,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=target.tied,
    )
    return made


# ---- OLMo-core ---------------------------------------------------------------------------------------------------


def olmo_model(target: Transformer, *, moe: str = "default", post_norm: bool = False, **router: Any) -> nn.Module:
    """Transformer or MoETransformer, with head-wise norms of queries and keys."""
    need("olmo_core.nn.transformer")
    from olmo_core.nn.attention import AttentionBackendName
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.moe import MoEConfig, MoERouterConfig
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig, TransformerType

    t = target

    def feed_forward(width: int) -> Any:
        return FeedForwardConfig(hidden_size=width, bias=False)

    def config(b: mue.Block) -> Any:
        name = "moe" if b.is_moe else "default"
        if post_norm:
            name = "moe_reordered_norm" if b.is_moe else "reordered_norm"
        parts: dict[str, Any] = {"feed_forward": feed_forward(b.ffn or 1)}
        if b.is_moe:
            chosen = {"top_k": b.active, "normalize_expert_weights": 1.0, "gating_function": b.router, **router}
            parts["feed_forward_moe"] = MoEConfig(
                name=moe,
                num_experts=b.experts,
                hidden_size=b.expert,
                capacity_factor=1.0 if moe == "default" else None,
                router=MoERouterConfig(**chosen),
                shared_mlp=feed_forward(b.shared_width) if b.shared_experts else None,
                lb_loss_weight=None,
            )
        made = TransformerConfig.llama_like(
            d_model=t.width,
            vocab_size=t.vocab,
            n_layers=t.layers,
            n_heads=t.num_heads,
            n_kv_heads=t.num_kv_heads,
            head_dim=t.head_dim,
            qk_norm=True,
            use_head_qk_norm=True,
            attn_backend=AttentionBackendName.torch,
            name=TransformerType.moe if any(b.is_moe for b in t.blocks) else TransformerType.default,
            block_name=TransformerBlockType(name),
            tie_word_embeddings=t.tied,
            **parts,
        )
        if b.is_moe:
            made.block.feed_forward = None
        return made

    blocks = t.per_layer
    whole = config(blocks[-1])
    whole.block_overrides = {i: config(b).block for i, b in enumerate(blocks)}
    made: nn.Module = whole.build(init_device="cpu")
    return made


def olmo_fused_model(target: Transformer, *, pre_norm: bool = True) -> nn.Module:
    """OLMoDDPModel: experts and a shared one in every layer, as OLMo-core writes Qwen3's in its fused form."""
    need("olmo_core.nn.moe.v2.qwen")
    from olmo_core.config import DType
    from olmo_core.nn.attention import AttentionBackendName
    from olmo_core.nn.moe.v2.qwen import build_qwen3_moe_config

    b = target.blocks[0]
    linear_attention = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    config = build_qwen3_moe_config(
        vocab_size=target.vocab,
        d_model=target.width,
        n_layers=target.layers,
        num_attention_heads=target.num_heads,
        num_key_value_heads=target.num_kv_heads,
        attention_head_dim=target.head_dim,
        attention_rotary_dim=target.head_dim,
        attention_output_gate=False,
        attention_backend=AttentionBackendName.torch,
        layer_types=["full_attention"] * target.layers,
        num_experts=b.experts,
        num_experts_per_tok=b.active,
        moe_intermediate_size=b.expert,
        shared_expert_intermediate_size=b.shared_width,
        dtype=DType.float32,
        **{f"linear_{name}": None for name in linear_attention},
    )
    config.block.shared_experts_router = None  # the rule's shared experts have no gate
    config.block.use_pre_norm = pre_norm
    made: nn.Module = config.build(init_device="cpu")
    return made
