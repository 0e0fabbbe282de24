"""The planned attention scale in a stack that has no setting for it: a factor beyond the plan's own fold.

Such factors are a mapping ``pattern of a layout row → c`` for :func:`mue.export.rows.rows`, with a line for the file's head.
"""

from __future__ import annotations

import math

from torch import nn

from mue.export.skeleton import Skeleton
from mue.layouts.layout import HasLayout, unwrap
from mue.plan.plan import PlanData
from mue.util.text import number

Extra = dict[str, float]


def query_scale(plan: PlanData, model: Skeleton) -> tuple[Extra, list[str]]:
    """The planned attention scale, in a stack that always divides by √head_dim.

    It goes half into the gain of the query norm and half into that of the key norm (torchtitan starts both from one
    config), or else into the query projection.

    Raises:
        ValueError: neither norms nor a query projection of its own.
    """
    c = plan.attention_scale * math.sqrt(plan.target.head_dim)
    if math.isclose(c, 1.0):
        return {}, []
    gains = [row.pattern for row in model.layout() if row.pattern.endswith((".q_norm.weight", ".k_norm.weight"))]
    if len(gains) == 2:
        # q·k takes √c from either side
        half = math.sqrt(c)
        change = f"the gains of both the query and the key norm start at {number(half)}, with lr and eps to match"
        return dict.fromkeys(gains, half), [_scale_note(plan, change)]
    queries = [row for row in model.layout() if row.role == "attention_q"]
    if len(queries) != 1 or queries[0].parts:
        raise ValueError(
            f"the plan's attention scale is {number(c)} of the stack's, which divides by √head_dim and has no setting for it;"
            f" and there are neither query and key norms nor a query projection of its own to fold it into: use a base of"
            f" head_dim {plan.target.head_dim}, or a model with norms of queries and keys"
        )
    return {queries[0].pattern: c}, [_scale_note(plan, f"the query projection is {number(c)} times as large")]


def own_scale(plan: PlanData, model: nn.Module) -> str:
    """The line on the attention scale for a model that describes itself, or ``""`` where there is nothing to do.

    No weight carries the scale there: whether the forward code has the planned one already cannot be seen from parameters. On a
    stock model the queries, or the gain of their norm, carry it (:func:`mue.model.stock.query_coefficients`).

    Args:
        plan: folded or not. model: what the file is written for.
    """
    return needed_scale(plan, "scale= of scaled_dot_product_attention") if isinstance(unwrap(model), HasLayout) else ""


def needed_scale(plan: PlanData, argument: str) -> str:
    """The same for forward code that nobody can see; ``argument``: how attention is told its scale."""
    usual = plan.target.head_dim**-0.5
    if math.isclose(plan.attention_scale, usual):
        return ""
    return (
        f"the attention scale: queries times keys are to be multiplied by {plan.attention_scale!r}, and not by the usual 1/√head_dim ="
        f" {number(usual)}: set it in the model's forward code ({argument})"
    )


def _scale_note(plan: PlanData, change: str) -> str:
    return f"the attention scale {number(plan.attention_scale)} (there is no setting for it): {change}"
