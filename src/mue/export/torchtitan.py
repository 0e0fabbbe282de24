"""A plan as a torchtitan recipe: param_groups, the param_init of every sub-config, and the routers' route_scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from typing import Any

from mue.export.file_text import clipping, head, table
from mue.export.muon import is_muon, moved, one_rate, refuse_fused
from mue.export.registry import STACKS
from mue.export.rows import ExportRow, rows
from mue.export.scale import query_scale
from mue.export.skeleton import NativeStack
from mue.export.stack_model import (
    EXPERT_OUT_IN,
    IN_OUT,
    KV,
    QKV,
    VECTOR,
    StackModel,
    bias_params,
    gated_params,
    norm_params,
    param,
)
from mue.layouts.layout import HEADS
from mue.plan.fold import fold, unfold
from mue.plan.plan import PlanData
from mue.rules.optimizers import BOTH
from mue.shapes.block import Block
from mue.shapes.update_scales import UPDATE_SCALES
from mue.util.text import number

# Names and axes as in torchtitan 0.3; the suffixes of its experts' names (w1_EFD) say their axes. Its groups are
# absolute values, found by pattern.search, the first that matches; one without a match is an error.
_T = "layers.*"
_TITAN = (
    param("tok_embeddings.weight", "embedding", IN_OUT),
    param(f"{_T}.attention.qkv_linear.wqkv.weight", QKV, order=HEADS),
    param(f"{_T}.attention.wo.weight", "attention_o"),
    *norm_params(_T, ("attention_norm", "ffn_norm")),
    *gated_params(f"{_T}.feed_forward", "ffn"),
    param(f"{_T}.moe.router.gate.weight", "router"),
    param(f"{_T}.moe.routed_experts.inner_experts.w1_EFD", "expert_gate", EXPERT_OUT_IN),
    param(f"{_T}.moe.routed_experts.inner_experts.w3_EFD", "expert_up", EXPERT_OUT_IN),
    param(f"{_T}.moe.routed_experts.inner_experts.w2_EDF", "expert_down", EXPERT_OUT_IN),
    *gated_params(f"{_T}.moe.shared_experts", "shared"),
    param("norm.weight", "final_norm", VECTOR),
    param("lm_head.weight", "head"),
)
_UNFUSED = tuple(param(f"{_T}.attention.qkv_linear.w{x}.weight", f"attention_{x}") for x in "qkv")
_TITAN_UNFUSED = (_TITAN[0], *_UNFUSED, *_TITAN[2:])
_TITAN_QK = tuple(norm_params(f"{_T}.attention", ("q_norm", "k_norm"), "qk_norm"))
TORCHTITAN = NativeStack(
    "torchtitan",
    {
        "qwen3": StackModel("fused q, k and v, norms of queries and keys", _TITAN + _TITAN_QK),
        "llama3": StackModel("fused q, k and v, no norms of queries and keys", _TITAN),
        "qwen3_unfused": StackModel("fuse_qkv=False, norms of queries and keys", _TITAN_UNFUSED + _TITAN_QK),
        "llama3_unfused": StackModel("fuse_qkv=False, no norms of queries and keys", _TITAN_UNFUSED),
    },
    others=(
        *bias_params(f"{_T}.attention.qkv_linear", ("wqkv", "wq", "wk", "wv")),
        # latent attention
        *(param(f"{_T}.attention.{w}.weight", "attention_q") for w in ("wq", "wq_a", "wq_b")),
        *(param(f"{_T}.attention.{w}.weight", KV) for w in ("wkv_a", "wkv_b")),
        *norm_params(f"{_T}.attention", ("q_norm", "kv_norm")),
    ),
)

_GROUPS = '''

def param_groups():
    """One group for each distinct setting. Behind a dot may stand what activation checkpointing puts there."""
    merged = {}
    for pattern, lr, weight_decay, eps, *_ in ROWS:
        merged.setdefault((lr, weight_decay, eps), []).append(pattern.replace(r"\\.", r"\\.(?:_\\w+\\.)*"))
    return [
        ParamGroupConfig(
            pattern=f"^(?:{'|'.join(patterns)})$",
            optimizer_name="AdamW",
            optimizer_kwargs={"lr": lr, "betas": BETAS, "eps": eps, "weight_decay": weight_decay},
        )
        for (lr, weight_decay, eps), patterns in merged.items()
    ]
'''
_MUON_GROUPS = '''

def param_groups():
    """One group for each distinct setting of AdamW, and the one that DistMuon takes. Behind a dot may stand what activation
    checkpointing puts there."""
    merged = {}
    for pattern, lr, weight_decay, eps, *_ in ROWS:
        group = ("DistMuon",) if pattern in MUON else ("AdamW", lr, weight_decay, eps)
        merged.setdefault(group, []).append(pattern.replace(r"\\.", r"\\.(?:_\\w+\\.)*"))
    return [
        ParamGroupConfig(
            pattern=f"^(?:{'|'.join(patterns)})$",
            optimizer_name=name,
            optimizer_kwargs=dict(zip(("lr", "weight_decay", "eps"), values)) | {"betas": BETAS} if values else DIST_MUON,
        )
        for (name, *values), patterns in merged.items()
    ]


def layouts():
    """Which matrices are whole, which are a stack: DistMuon's own arguments. One bucket for each layer, one for its experts."""
    whole = ComputeLayout(shardings_by_mesh_axis={"dp_shard": Owned()})
    stack = ComputeLayout(shardings_by_mesh_axis=dict.fromkeys(("dp_shard", "efsdp", "ep"), Shard(0)))
    found, buckets = {}, []
    for layer in range(len(LAYERS)):
        for kind, stacked in (("matrices", False), ("experts", True)):
            names = [glob.replace("*", str(layer), 1) for glob, is_stack in MUON.values() if is_stack == stacked]
            found |= dict.fromkeys(names, stack if stacked else whole)
            buckets.append(BucketConfig(name=f"layers.{layer}, {kind}", patterns=tuple(names)))
    return {"DistMuon": {"compute_sharding_by_fqn": found, "bucket_configs": buckets}}
'''
_CODE = '''

def set_init(model):
    """Put the planned starts into param_init of every sub-config of a model config."""
    for path, config, _, _ in model.traverse(Module.Config, recurse=True):
        for name in config.param_init or ():
            # one config stands for both: qk_norm for q_norm and k_norm, wkv for wk and wv
            parameter = f"{path}.{name}".replace(".qk_norm.", ".q_norm.").replace(".wkv.", ".wk.")
            for pattern, _, _, _, std, constant in ROWS:
                if re.fullmatch(pattern, parameter) and (std is not None or constant is not None):
                    start = partial(nn.init.normal_, std=std) if std is not None else partial(nn.init.constant_, val=constant)
                    config.param_init = {**config.param_init, name: start}
    if model.enable_weight_tying:  # the head's start is drawn last, into the same tensor
        model.lm_head.param_init = model.tok_embeddings.param_init


def _layer(layer):
    """What a layer of a model config is, as LAYERS has it."""
    if layer.moe is None:
        return (layer.feed_forward.w1.out_features,)
    shared, router = layer.moe.shared_experts, layer.moe.router
    widths = layer.moe.routed_experts.inner_experts.hidden_dim, shared.w1.out_features if shared else 0
    return (*widths, layer.moe.num_experts, router.top_k, router.score_func, router.route_norm)


def apply(config):
    """A Trainer.Config of the planned shape, with this plan's groups, starts and route scales."""
    model = config.model_spec.model
    found = (model.dim, model.vocab_size, [_layer(layer) for layer in model.layers])
    if found != (WIDTH, VOCAB, LAYERS):
        raise ValueError(f"this plan is for {(WIDTH, VOCAB, LAYERS)}, the config has {found}")
    for layer, scale in zip(model.layers, ROUTE_SCALE):
        if layer.moe is not None:
            layer.moe.router.route_scale = scale
    set_init(model)
    config.optimizer = OptimizersContainer.Config(param_groups=param_groups()MORE)
    return config
'''
_IMPORTS = (
    "re",
    "from functools import partial",
    "",
    "from torch import nn",
    "from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig",
    "from torchtitan.protocols.module import Module",
)
_MUON_IMPORTS = (
    "from torch.distributed.tensor import Shard",
    "from torchtitan.distributed.flex_shard import BucketConfig, ComputeLayout, Owned",
)
_USE = """    config = apply(qwen3_30b_a3b())    # in a config function of your own; any Trainer.Config of the planned shape

apply() sets optimizer.param_groups, param_init of every sub-config, and route_scale of every router."""


@STACKS.register("torchtitan", place=4)
def torchtitan(plan: PlanData, model: Any) -> str:
    """The recipe's text. R stays in the model: torchtitan's routers have a scale of their own.

    Raises:
        ValueError: what torchtitan has no setting for and cannot be folded.
    """
    # R stays: the router's own route_scale is its home, and only A and l^-α go into the weights. But under Muon the rate of a down
    # projection has R in it: with R in the weights as well the two cancel, and one rate, as DistMuon has it, is enough for more plans
    plan = fold(unfold(plan), "weights" if is_muon(plan) else "model")
    made = TORCHTITAN.model(plan.target, model)
    extra, notes = query_scale(plan, made)
    found = rows(plan, made, extra, BOTH)
    muon = ""
    if is_muon(plan):
        found, muon = _dist_muon(plan, found)
    cannot = [
        *notes,
        "pipeline parallelism: OptimizersContainer demands that every pattern finds a parameter in every stage, and a stage "
        "without embedding or head has none of theirs",
        *(["DistMuon runs on parameters that FSDP has sharded over GPUs, and nowhere else"] if muon else []),
        clipping(plan, "training.max_norm"),
        *_group_line(plan),
    ]
    more = ", optimizer_factory_kwargs_by_name=layouts()" if muon else ""
    return (
        head(plan, f"torchtitan 0.3, model {made.title}", _USE, cannot, _IMPORTS + (_MUON_IMPORTS if muon else ()))
        + table(plan, found)
        + _shape(plan)
        + muon
        + (_MUON_GROUPS if muon else _GROUPS)
        + _CODE.replace("MORE", more)
    )


def _dist_muon(plan: PlanData, found: list[ExportRow]) -> tuple[list[ExportRow], str]:
    """The rows with the one rate that DistMuon takes, and its settings as code.

    Raises:
        ValueError: several rates; a tensor of several projections, which it would orthogonalise as one.
    """
    refuse_fused(found, "torchtitan's DistMuon", "build the attention with fuse_qkv=False (--model qwen3_unfused)")
    one = "torchtitan 0.3 takes one group for all that Muon moves"
    scale, lr, wd = one_rate(moved(found), plan, list(UPDATE_SCALES), one)
    found = [row if row.matrices is None else replace(row, lr=lr, weight_decay=wd) for row in found]
    settings: dict[str, object] = {"lr": lr, "weight_decay": wd, "momentum": plan.momentum, "nesterov": True}
    settings |= {"adjust_lr_fn": UPDATE_SCALES[scale].torch, "fused": False, "foreach": False}
    lines = "".join(
        f'    r"{row.regex}": {(row.pattern, "expert" in row.matrices[0])!r},\n' for row in found if row.matrices
    )
    return (
        found,
        f"""DIST_MUON = {settings!r}
# pattern of what DistMuon moves → (its names, * the layer; whether experts are stacked in it)
MUON = {{
{lines}}}
""",
    )


def _shape(plan: PlanData) -> str:
    t = plan.target
    layers = [_layer(block) for block in t.per_layer]
    return f"""WIDTH, VOCAB = {t.width}, {t.vocab}
# (width of a dense layer), or (of an expert, of the shared ones, number of experts, top_k, score_func, route_norm)
LAYERS = {_runs(layers)}
ROUTE_SCALE = {_runs(plan.multipliers.route)}  # R; the rest of the branch's multiplier is in the weights
"""


def _layer(block: Block) -> tuple[object, ...]:
    if not block.is_moe:
        return (block.ffn,)
    return block.expert, block.shared_width, block.experts, block.active, block.router, block.normalize


def _runs(values: Iterable[object]) -> str:
    """A list as code, runs of one value multiplied."""
    return " + ".join(f"[{value!r}] * {len(list(run))}" for value, run in groupby(values))


def _group_line(plan: PlanData) -> list[str]:
    if all(block.groups == 1 for block in plan.target.blocks):
        return []
    many = number(max(block.groups for block in plan.target.blocks))
    return [f"balanced choice from each of {many} groups: num_limited_groups is another thing. No value depends on it"]
