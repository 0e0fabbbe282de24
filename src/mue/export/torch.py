"""A plan for a training loop of one's own, with or without Accelerate: ``init_`` and ``param_groups``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mue.export.hf_model import transformers_model
from mue.export.loop_file import loop_file
from mue.export.registry import STACKS
from mue.export.rows import folded
from mue.export.skeleton import shaped
from mue.export.stack_model import EXPERT_OUT_IN, IN_OUT, VECTOR, StackModel, norm_params, param
from mue.plan.plan import PlanData
from mue.shapes import Transformer

_USE = "    init_(model)\n    optimizer = OPTIMIZER"


@STACKS.register("torch", place=1)
def torch(plan: PlanData, model: Any) -> str:
    """The file's text. Without a model it is written for the lab's LanguageModel, which has every shape that can be planned."""
    plan = folded(plan)
    module, name = _language_model(plan.target) if model is None else transformers_model(plan.target, model)
    return loop_file(plan, module, name, _USE)


def _language_model(target: Transformer) -> tuple[nn.Module, str]:
    """The lab's model in the planned shape, by name and shape: nothing of the lab has to be installed."""
    name = "LanguageModel"
    parts = ("up", "gate", "down") if target.gated else ("up", "down")
    table = (
        param("embedding.weight", "embedding", IN_OUT),
        *(param(f"blocks.*.attention.{x}.weight", f"attention_{x}") for x in "qkvo"),
        *norm_params("blocks.*.attention", ("q_norm", "k_norm"), "qk_norm"),
        *norm_params("blocks.*", ("attention_norm", "ffn_norm")),
        *(param(f"blocks.*.ffn.{part}.weight", f"ffn_{part}") for part in parts),
        param("blocks.*.moe.router.weight", "router"),
        *(param(f"blocks.*.moe.experts_{part}", f"expert_{part}", EXPERT_OUT_IN) for part in parts),
        *(
            replace(param(f"pools.{i}.{part}", f"expert_{part}", EXPERT_OUT_IN), layers=layers)
            for i, layers in enumerate(target.pool_layers)
            for part in parts
        ),
        *(param(f"blocks.*.moe.shared_{part}", f"shared_{part}") for part in parts),
        param("final_norm.weight", "final_norm", VECTOR),
        param("head.weight", "head"),
    )
    kinds = dict.fromkeys(block.router_kind for block in target.blocks if block.experts)
    scalars = dict.fromkeys(scalar for kind in kinds for scalar in kind.scalars)
    moe = tuple(param(f"blocks.*.moe.router.{scalar}", "norm", VECTOR) for scalar in scalars)
    return shaped(StackModel("the lab's model", table, moe=moe), target, name), name
