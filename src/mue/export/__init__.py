"""A plan in another stack's own words: :func:`export` returns the text of a file."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mue.export.automodel import automodel_file
from mue.export.python import torch_file
from mue.export.rows import ExportRow, rows
from mue.fold import fold
from mue.plan import Plan
from mue.words import nearest

__all__ = ["STACKS", "ExportRow", "export", "rows"]

STACKS = ("torch", "transformers", "automodel")


def export(plan: Plan, to: str, model: nn.Module | Any) -> str:
    """The plan as a file of a stack.

    Args:
        plan: folded first where it is not (R in the weights): no stack's forward code changes.
        to: ``"torch"`` (own loop, Accelerate), ``"transformers"`` (Hugging Face Trainer) or ``"automodel"`` (NeMo).
        model: the planned model (the meta device will do), a transformers config, or the path or family of one.

    Raises:
        ValueError: an unknown stack; a model that is not the planned one; what the stack's dialect cannot say at all.
    """
    if to not in STACKS:
        raise ValueError(f"unknown stack {to!r}{nearest(to, STACKS)}")
    folded = plan if plan.folding is not None else fold(plan)
    module = _module(model)
    found = rows(folded, module)
    name = type(module).__name__
    if to == "automodel":
        return automodel_file(folded, found, name)
    return torch_file(folded, found, name, trainer=to == "transformers")


def _module(model: nn.Module | Any) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    from mue.layouts.families import build, read_config

    with torch.device("meta"):
        return build(read_config(model) if isinstance(model, str) or hasattr(model, "joinpath") else model)
