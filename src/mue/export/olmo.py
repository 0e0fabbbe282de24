"""A plan as OLMo-core's optimizer config: one OptimGroupOverride for each distinct setting, and an init by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from mue.export.file_text import INIT, clipping, commonest, head, matching, table
from mue.export.muon import DION, is_muon, moved, refuse_fused, refuse_stacked, restated
from mue.export.registry import STACKS
from mue.export.rows import ExportRow, rows
from mue.export.scale import Extra, query_scale
from mue.export.skeleton import NativeStack, Skeleton
from mue.export.stack_model import (
    EXPERT_OUT_IN,
    IN_OUT,
    VECTOR,
    StackModel,
    bias_params,
    gated_params,
    norm_params,
    param,
)
from mue.layouts.layout import Layout
from mue.plan.fold import fold, unfold
from mue.plan.plan import PlanData
from mue.rules.optimizers import BOTH
from mue.rules.roles import ROLES
from mue.shapes.block import Block
from mue.util.text import number

# Names and axes as OLMo-core's code multiplies them. It flattens experts to (N·in, out), or (N·out, in) where dropless,
# under one name, so each kind of experts is a model of its own here.
_O = "blocks.*"
_OLMO_NORMS = tuple(norm_params(_O, ("attention_norm", "feed_forward_norm")))
_OLMO = (
    param("embeddings.weight", "embedding", IN_OUT),
    *(param(f"{_O}.attention.w_{x}.weight", f"attention_{x}") for x in "qkv"),
    param(f"{_O}.attention.w_out.weight", "attention_o"),
    *norm_params(f"{_O}.attention", ("q_norm", "k_norm"), "qk_norm"),
    *_OLMO_NORMS,
    param("lm_head.norm.weight", "final_norm", VECTOR),
    param("lm_head.w_out.weight", "head"),
)
_OLMO_MOE = (
    *gated_params(f"{_O}.feed_forward", "ffn"),
    *gated_params(f"{_O}.feed_forward_moe.shared_mlp", "shared"),
    param(f"{_O}.feed_forward_moe.router.weight", "router", ("expert*in",)),
)


def _olmo_experts(inwards: tuple[str, ...]) -> tuple[Layout, ...]:
    mlp = f"{_O}.feed_forward_moe.experts.mlp"
    return (
        param(f"{mlp}.w1", "expert_gate", inwards),
        param(f"{mlp}.w3", "expert_up", inwards),
        param(f"{mlp}.w2", "expert_down", ("expert*in", "out")),
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
    # a norm after a projection cancels its scale, so ρ_L^-α goes into that norm's gain (docs/why/fold.md)
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


class _OlmoCore(NativeStack):
    def rows_for(self, model: nn.Module) -> list[Layout]:
        rows = super().rows_for(model)
        return post_normed(rows) if norms_last(model) else rows


OLMO = _OlmoCore(
    "olmo-core",
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
                param(f"{_O}.routed_experts_router.weight", "router", ("expert*in",)),
                param(f"{_O}.routed_experts.w_up_gate", ("expert_up", "expert_gate"), EXPERT_OUT_IN),
                param(f"{_O}.routed_experts.w_down", "expert_down", ("expert", "in", "out")),
                param(f"{_O}.shared_experts.w_up_gate", ("shared_up", "shared_gate"), IN_OUT),
                param(f"{_O}.shared_experts.w_down", "shared_down", ("expert", "in", "out")),
            ),
        ),
    },
    others=(
        *norm_params(f"{_O}.attention", ("q_norm", "k_norm")),  # over all heads together: a gain like any other
        *bias_params(
            _O, (*(f"attention.w_{x}" for x in ("q", "k", "v", "out")), "attention_norm", "feed_forward_norm")
        ),
        *bias_params(f"{_O}.feed_forward", ("w1", "w2", "w3")),
        *bias_params(f"{_O}.feed_forward_moe.shared_mlp", ("w1", "w2", "w3")),
        *bias_params("lm_head", ("norm", "w_out")),
        param(f"{_O}.shared_experts_router.weight", "router", ("in",)),  # the gate of a shared expert
    ),
)


_CODE = '''

def optim(**more):
    """The optimizer's config; ``more`` are its other fields."""
    merged = {}
    for pattern, lr, weight_decay, eps, *_ in ROWS:
        merged.setdefault((lr, weight_decay, eps), []).append(pattern)
    lr, weight_decay, eps = DEFAULT
    return {CONFIG}(
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        betas=BETAS,
        group_overrides=[
            OptimGroupOverride(params=patterns, opts={"lr": lr, "weight_decay": weight_decay, "eps": eps})
            for (lr, weight_decay, eps), patterns in merged.items()
        ],
        **more,
    )
'''
_CHECK = '''

def check(model):
    """What would break the plan in silence: norms elsewhere in the block, routers whose weights do not sum as planned."""
    for name, module in model.named_modules():
        kind = type(module).__name__.removeprefix("FSDP")
        pre_norm = getattr(module, "use_pre_norm", PRE_NORM)
        if kind.endswith("TransformerBlock") and (kind not in BLOCKS or pre_norm != PRE_NORM):
            raise ValueError(f"{name}: {kind}, use_pre_norm={pre_norm}; planned {BLOCKS}, use_pre_norm={PRE_NORM}")
        if hasattr(module, "normalize_expert_weights") and "shared" not in name:
            found = {key: getattr(module, key, None) or None for key in ROUTERS[0]}
            if found not in ROUTERS:
                raise ValueError(f"{name} has {found}, planned {ROUTERS}")
'''
# MuonConfig refuses group_overrides, and makes its own groups in a method, which is what a subclass changes.
_MUON = '''

@dataclass
class Planned(MuonConfig):
    """OLMo-core's Muon with the plan's groups, in the place of one rate for all matrices."""

    def default_group_overrides(self, model):
        check(model)
        merged = {}
        for pattern, lr, weight_decay, eps, *_ in ROWS:
            opts = {"lr": lr, "weight_decay": weight_decay}
            if pattern not in MUON:
                opts |= {"algorithm": "adamw", "epsilon": eps, "beta1": BETAS[0], "beta2": BETAS[1]}
            merged.setdefault(tuple(opts.items()), []).append(pattern)
        return [OptimGroupOverride(params=patterns, opts=dict(opts)) for opts, patterns in merged.items()]


def optim(**more):
    """The optimizer's config; ``more`` are its other fields."""
    lr, weight_decay, _ = DEFAULT
    return Planned(lr=lr, weight_decay=weight_decay, betas=BETAS, mu=MOMENTUM, nesterov=True, adjust_lr=ADJUST_LR, **more)
'''
_KEYS = ("gating_function", "normalize_expert_weights", "restore_weight_scale", "expert_weight_scale")
_USE = """    config.optim = optim()                   # TransformerTrainModuleConfig(optim=..., ...)
    init_(train_module.model)                # after the train module is built, before the first step"""
_USE_V2 = """    config.optim = optim()                   # OLMoDDPTrainModuleConfig(optim=..., ...)
    for part in train_module.model_parts:    # after the train module is built, before the first step
        init_(part)
    train_module.optim._copy_model_params_to_main_params()  # its master copies were made before"""


def averaged_shared(plan: PlanData, model: Skeleton) -> tuple[Extra, list[str]]:
    """OLMo-core's MoEConfig with a shared_mlp adds k/(k+1) of the routed sum to 1/(k+1) of the shared output.

    Raises:
        ValueError: layers with another number of active experts, where one row stands for all of them.
    """
    moe = "blocks.*.feed_forward_moe."
    if not any(row.pattern.startswith(f"{moe}shared_mlp.") for row in model.layout()):
        return {}, []
    counts = {block.active for block in plan.target.blocks if block.shared_experts}
    if len(counts) != 1:
        raise ValueError(
            "OLMo-core weighs shared_mlp by 1/(top_k + 1), and the plan's layers differ in active experts: plan with one"
            " number of them, or without shared experts"
        )
    # Found by reading its MoE, and held by a test that runs its forward: applied by names alone, a plan would have been
    # off by 1.5 and 3 times at k = 2, without a word (docs/LOG.md, "Exports fed to the real packages").
    k = counts.pop()
    routed, shared = (k + 1) / k, float(k + 1)
    extra = {f"{moe}experts.mlp.w2": routed, f"{moe}shared_mlp.w2.weight": shared, f"{moe}shared_mlp.w2.bias": shared}
    return extra, [
        f"OLMo-core weighs the routed sum by {k}/{k + 1} and shared_mlp by 1/{k + 1}, which the rule does not: both are made"
        f" good in the down projections ({number(routed)} and {number(shared)} times as large)"
    ]


@STACKS.register("olmo-core", place=6)
def olmo_core(plan: PlanData, model: Any) -> str:
    """The file's text. R is in the weights: OLMo-core's routers have no scale of their own.

    Raises:
        ValueError: what OLMo-core has no setting for and cannot be folded.
    """
    plan = fold(unfold(plan), "weights")
    made = OLMO.model(plan.target, model)
    v2 = any(row.pattern.startswith("blocks.*.routed_experts.") for row in made.layout())
    query, notes = query_scale(plan, made)
    shared, averaged = averaged_shared(plan, made)
    found = rows(plan, made, query | shared, BOTH)
    muon = is_muon(plan)
    if muon:
        found = _of_muon(plan, found)
    roles = {row.role: shared[row.pattern] for row in made.layout() if row.pattern in shared}
    cannot = [
        "init by role (InitMethod knows one std for all inner matrices, cut at three of it): init_ draws every tensor anew",
        *notes,
        *averaged,
        "activation checkpointing of chosen modules renames their parameters: OLMo-core then stops at a pattern without match"
        + (" (or, in OLMoDDPOptimizer, only logs it)" if v2 else ""),
        clipping(plan, "max_grad_norm", roles),
    ]
    config = "MuonConfig" if muon else "OLMoDDPOptimizerConfig" if v2 else "AdamWConfig"
    imports = (
        "re",
        *(["from dataclasses import dataclass"] if muon else []),
        "from fnmatch import fnmatchcase",
        "",
        "torch",
        f"from olmo_core.optim import {config}, OptimGroupOverride" + ("  # needs dion" if muon else ""),
    )
    text = head(plan, f"ai2-olmo-core 3.0, model {made.title}", _USE_V2 if v2 else _USE, cannot, imports)
    text += table(plan, found, lambda row: [("*" if v2 else "") + glob for glob in row.globs])  # behind DDP's "module."
    text += f"DEFAULT = {commonest(moved(found) or found).setting!r}\n{_blocks(made)}{_routers(plan)}"
    text += _muon_settings(plan, found) if muon else ""
    init = INIT.replace("torch.manual_seed(seed)", "torch.manual_seed(seed)\n    check(model)")
    code = (_MUON if muon else _CODE.replace("{CONFIG}", config)) + _CHECK
    return text + matching("fnmatchcase(_name(name), row[0])", every_row=False) + code + init


def _of_muon(plan: PlanData, found: list[ExportRow]) -> list[ExportRow]:
    """The rows in a convention that dion's Muon has, which OLMo-core's MuonConfig builds."""
    refuse_stacked(
        found,
        "OLMo-core's Muon would orthogonalise them as one matrix (or, of three axes, refuses them)",
        'export("torch")',
    )
    refuse_fused(found, "OLMo-core 3.0", "build its attention with w_q, w_k and w_v, its feed-forward with w1 and w3")
    return restated(found, plan, _scale(plan))


def _scale(plan: PlanData) -> str:
    return plan.tuned.update_scale if plan.tuned.update_scale in DION else "spectral"


def _muon_settings(plan: PlanData, found: list[ExportRow]) -> str:
    """MOMENTUM, ADJUST_LR and MUON as code."""
    names = [glob for row in moved(found) for glob in row.globs]
    return f"MOMENTUM, ADJUST_LR = {plan.momentum!r}, {DION[_scale(plan)]!r}\nMUON = {names!r}\n"


def _blocks(model: Skeleton) -> str:
    last = any(row.after for row in model.layout())
    kinds = (
        ("ReorderedNormTransformerBlock", "MoEReorderedNormTransformerBlock")
        if last
        else ("TransformerBlock", "MoETransformerBlock")
    )
    return f"BLOCKS, PRE_NORM = {(*kinds, 'OLMoDDPTransformerBlock')!r}, {not last}\n"


def _routers(plan: PlanData) -> str:
    routers = [_router(block) for block in plan.target.blocks if block.experts]
    lines = "".join(f"    {router!r},\n" for router in {repr(r): r for r in routers}.values())
    return f"ROUTERS = [  # every router is one of these\n{lines}]\n"


def _router(block: Block) -> dict[str, object]:
    planned = (block.router, 1.0 if block.normalize else None, None, None)
    return {"top_k": block.active, **dict(zip(_KEYS, planned, strict=True))}
