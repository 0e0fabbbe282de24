"""A stack's own models as tables: role and axes of every parameter, as the stack's code multiplies by it.

The first ``*`` of a pattern is the layer, a second one the expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mue.layouts.layout import BLOCKS, Layout

OUT_IN, IN_OUT, EXPERT_OUT_IN, VECTOR = ("out", "in"), ("in", "out"), ("expert", "out", "in"), ("vector",)
QKV = ("attention_q", "attention_k", "attention_v")
KV = QKV[1:]


@dataclass(frozen=True)
class StackModel:
    """One kind of model of a stack.

    Attributes:
        summary: its configuration in the stack's words.
        rows: parameters of every layer whose role the layer has; outside the layers, of the model.
        dense, moe: parameters of dense layers only, and of those with experts only.
    """

    summary: str
    rows: tuple[Layout, ...]
    dense: tuple[Layout, ...] = ()
    moe: tuple[Layout, ...] = ()


def param(pattern: str, role: str | tuple[str, ...], axes: tuple[str, ...] = OUT_IN, order: str = BLOCKS) -> Layout:
    """A row of a table; several roles are fused in the tensor, in this order along its out axis."""
    parts = role if isinstance(role, tuple) else ()
    return Layout(pattern, parts[0] if parts else str(role), axes, parts, order=order)


def gated_params(prefix: str, kind: str) -> list[Layout]:
    """A feed-forward whose w1 is the gate, w3 the up, w2 the down projection, as in Llama's reference code."""
    parts = {"w1": "gate", "w3": "up", "w2": "down"}
    return [param(f"{prefix}.{w}.weight", f"{kind}_{part}") for w, part in parts.items()]


def norm_params(prefix: str, names: Iterable[str], role: str = "norm") -> list[Layout]:
    """The gains of the norms of some names."""
    return [param(f"{prefix}.{name}.weight", role, VECTOR) for name in names]


def bias_params(prefix: str, names: Iterable[str]) -> list[Layout]:
    """The biases of the modules of some names."""
    return [param(f"{prefix}.{name}.bias", "bias", VECTOR) for name in names]
