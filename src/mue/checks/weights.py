"""The matrices of a feed-forward, of each expert and of what is fused or stacked, as (out, in), and what they give for an input.

Shape suffixes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.layouts.layout import ParamInfo, expert_slices
from mue.rules.roles import ROLES

Pointwise = Callable[[Tensor], Tensor]
Mix = Callable[[Tensor | None, Tensor], Tensor]  # gate x (None where there is no gate) and up x → what down is given
POINTWISE: dict[str, Pointwise] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu²": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class Activation:
    """How a feed-forward makes of ``gate x`` and ``up x`` what its down projection is given.

    Attributes:
        name: for people. mix: does it. swapped: the nonlinearity is on ``up``.
    """

    name: str
    mix: Mix
    swapped: bool = False

    @staticmethod
    def pointwise(name: str, f: Pointwise, swapped: bool = False) -> Activation:
        """f(gate x) · up x, or f(up x) where there is no gate."""

        def mix(gate: Tensor | None, up: Tensor) -> Tensor:
            if gate is None:
                return f(up)
            return f(up) * gate if swapped else f(gate) * up

        return Activation(name, mix, swapped)


ACTIVATIONS = tuple(Activation.pointwise(name, f, s) for s in (False, True) for name, f in POINTWISE.items())


@dataclass(frozen=True)
class FeedForwardWeights:
    """The matrices of one feed-forward as (out, in); ``gate`` None where it has none."""

    up: Tensor
    gate: Tensor | None
    down: Tensor

    def __call__(self, x_TD: Tensor, activation: Activation) -> Tensor:
        gate = None if self.gate is None else x_TD @ self.gate.T
        return activation.mix(gate, x_TD @ self.up.T) @ self.down.T


def matrices(p: ParamInfo, tensor: Tensor, experts: bool) -> Iterator[tuple[str, Tensor]]:
    """(role, matrix as (out, in)) of one tensor, the parts of a fused one apart. ``experts``: the expert axis is gone."""
    axes = [a.removeprefix("expert*") for a in p.layout.axes if not (experts and a == "expert")]
    out, inner = axes.index("out"), axes.index("in")
    whole = tensor if (out, inner) == (0, 1) else tensor.transpose(out, inner)
    parts = p.layout.parts or (p.role,)
    yield from zip(parts, whole.chunk(len(parts), 0), strict=True)


def dense_parts(placed: Iterable[ParamInfo], layer: int, kind: str, dtype: torch.dtype) -> FeedForwardWeights | None:
    """The dense or shared feed-forward of a layer; several shared experts side by side are one of their joint width."""
    found: dict[str, list[Tensor]] = {}
    for p in placed:
        if p.layer == layer and ROLES[p.role].kind == kind:
            for _, tensor in expert_slices(p):
                for role, m in matrices(p, tensor, "expert" in p.layout.axes):
                    found.setdefault(ROLES[role].part, []).append(m.to(dtype))
    return _assembled(found)


def expert_parts(placed: Iterable[ParamInfo], layer: int, dtype: torch.dtype) -> Iterator[FeedForwardWeights]:
    """Every routed expert of a layer, one after another (their copies are freed as they go)."""
    own = [p for p in placed if p.layer == layer and ROLES[p.role].kind == "expert"]
    stacked = [p for p in own if "expert" in p.layout.axes or p.layout.stacked > 1]
    if stacked:
        slices = [[t for _, t in expert_slices(p)] for p in stacked]
        for many in zip(*slices, strict=True):
            yield _expert(zip(stacked, many, strict=True), "expert", dtype)
        return
    apart: dict[int, list[tuple[ParamInfo, Tensor]]] = {}
    for p in own:
        assert p.expert is not None
        apart.setdefault(p.expert, []).append((p, p.parameter.detach()))
    for expert in sorted(apart):
        yield _expert(apart[expert], "", dtype)


def _expert(pairs: Iterable[tuple[ParamInfo, Tensor]], gone: str, dtype: torch.dtype) -> FeedForwardWeights:
    found: dict[str, list[Tensor]] = {}
    for p, tensor in pairs:
        for role, m in matrices(p, tensor, bool(gone)):
            found.setdefault(ROLES[role].part, []).append(m.to(dtype))
    whole = _assembled(found)
    assert whole is not None
    return whole


def _assembled(found: dict[str, list[Tensor]]) -> FeedForwardWeights | None:
    if "up" not in found or "down" not in found:
        return None
    joined = {part: torch.cat(many, 1 if part == "down" else 0) for part, many in found.items()}
    return FeedForwardWeights(joined["up"], joined.get("gate"), joined["down"])
