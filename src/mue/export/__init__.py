"""A plan in another stack's own words: :func:`export` returns the text of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mue.export.automodel import automodel_file
from mue.export.megatron import megatron_file
from mue.export.olmo import olmo_file
from mue.export.python import torch_file
from mue.export.rows import ExportRow, rows
from mue.export.skeleton import Skeleton, read, skeleton, with_rows
from mue.export.stacks import STACKS as NATIVE
from mue.export.stockshape import stock_config
from mue.export.torchtitan import torchtitan_file
from mue.fold import fold, unfold
from mue.layouts.layout import HasLayout
from mue.plan.plan import PlanData
from mue.util.errors import nearest

__all__ = ["STACKS", "ExportRow", "export", "rows"]

STACKS = ("torch", "transformers", "automodel", *NATIVE)  # the last three train models of their own
_FILES: dict[str, Callable[[PlanData, Skeleton], str]] = {
    "torchtitan": torchtitan_file,
    "megatron": megatron_file,
    "olmo-core": olmo_file,
}


def export(plan: PlanData, to: str, model: nn.Module | Any = None) -> str:
    """The plan as a file of a stack.

    Args:
        plan: folded here, so that no stack's forward code changes. R goes into the stack's own route scale where it has one
            (torchtitan, Megatron-Core), else into the weights; for the others a plan that is folded already stays as it is.
        to: ``"torch"`` (own loop, Accelerate), ``"transformers"`` (Hugging Face Trainer), ``"automodel"`` (NeMo),
            ``"torchtitan"``, ``"megatron"`` (Megatron-Core) or ``"olmo-core"``.
        model: the planned model as a module (the meta device will do). Or, for the first three, a transformers config, or
            the path or family of one; for the other three, the name of one of :data:`mue.export.stacks.STACKS`' models,
            which is written from the plan's shape. None: transformers' family of the plan's shape, or the stack's first model.

    Raises:
        ValueError: an unknown stack; a model that is not the planned one; what the stack's dialect cannot say at all.
    """
    if to not in STACKS:
        raise ValueError(f"unknown stack {to!r}{nearest(to, STACKS)}")
    if to in NATIVE:
        _refuse_routers(plan, to)
        folded = fold(unfold(plan), "weights" if to == "olmo-core" else "model")
        return _FILES[to](folded, _native(folded, to, model))
    folded = plan if plan.folding is not None else fold(plan)
    module, name = _module(folded, to, model)
    found = rows(folded, module)
    if to == "automodel":
        return automodel_file(folded, found, name)
    return torch_file(folded, found, name, trainer=to == "transformers")


def _refuse_routers(plan: PlanData, to: str) -> None:
    for router in dict.fromkeys(block.router for block in plan.target.blocks if block.experts):
        if router not in NATIVE[to].routers:
            raise ValueError(
                f"{to} has no {router} router, only {' and '.join(NATIVE[to].routers)}: plan with one of those, or"
                ' export("torch") for a model of your own'
            )


def _native(plan: PlanData, to: str, model: Any) -> Skeleton:
    if isinstance(model, nn.Module):
        return with_rows(model) if isinstance(model, HasLayout) else read(to, plan.target, model)
    if model is not None and not isinstance(model, str):
        raise ValueError(
            f"{to} trains models of its own: give a module that it built, or one of {', '.join(NATIVE[to].models)}"
        )
    return skeleton(to, plan.target, model)


def _module(plan: PlanData, to: str, model: Any) -> tuple[nn.Module, str]:
    """The model, and what it is for people."""
    if isinstance(model, nn.Module):
        return model, type(model).__name__
    from mue.layouts.transformers.families import build, read_config

    if model is None:
        config, said = stock_config(plan.target)
    else:
        config, said = read_config(model) if isinstance(model, str | Path) else model, ""
    with torch.device("meta"):
        module = build(config)
    return module, f"{type(module).__name__}{said}"
