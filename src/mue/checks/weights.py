"""The matrices of a feed-forward, of each expert and of what is fused or stacked, as (out, in), and what they give for an input.

Shape suffixes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.layouts.layout import ParamInfo, expert_slices, weights_beside
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
    """The matrices of one feed-forward as (out, in) and their biases; ``gate`` None where it has none."""

    up: Tensor
    gate: Tensor | None
    down: Tensor
    biases: Mapping[str, Tensor]

    def __call__(self, x_TD: Tensor, activation: Activation) -> Tensor:
        gate = None if self.gate is None else F.linear(x_TD, self.gate, self.biases.get("gate"))
        hidden = activation.mix(gate, F.linear(x_TD, self.up, self.biases.get("up")))
        return F.linear(hidden, self.down, self.biases.get("down"))


def matrices(p: ParamInfo, tensor: Tensor, experts: bool) -> Iterator[tuple[str, Tensor]]:
    """(role, matrix as (out, in)) of one tensor, the parts of a fused one apart. ``experts``: the expert axis is gone."""
    axes = [a.removeprefix("expert*") for a in p.layout.axes if not (experts and a == "expert")]
    out, inner = axes.index("out"), axes.index("in")
    whole = tensor if (out, inner) == (0, 1) else tensor.transpose(out, inner)
    parts = p.layout.parts or (p.role,)
    yield from zip(parts, whole.chunk(len(parts), 0), strict=True)


def dense_parts(placed: Iterable[ParamInfo], layer: int, kind: str, dtype: torch.dtype) -> FeedForwardWeights | None:
    """The dense or shared feed-forward of a layer; several shared experts side by side are one of their joint width."""
    here = [p for p in placed if layer in p.layers]
    pieces = [
        piece
        for p in here
        if ROLES[p.role].kind == kind
        for expert, tensor in expert_slices(p)
        for piece in _pieces(p, tensor, expert, _bias_beside(p, here))
    ]
    return _assembled(pieces, dtype)


def expert_parts(placed: Iterable[ParamInfo], layer: int, dtype: torch.dtype) -> Iterator[FeedForwardWeights]:
    """Every routed expert of a layer, one after another (their copies are freed as they go)."""
    here = [p for p in placed if layer in p.layers]
    own = [p for p in here if ROLES[p.role].kind == "expert"]
    stacked = [p for p in own if "expert" in p.layout.axes or p.layout.stacked > 1]
    if stacked:
        beside = [_bias_beside(p, here) for p in stacked]
        for many in zip(*(expert_slices(p) for p in stacked), strict=True):
            found = zip(stacked, many, beside, strict=True)
            yield _whole([piece for p, (e, tensor), bias in found for piece in _pieces(p, tensor, e, bias)], dtype)
        return
    apart: dict[int, list[_Piece]] = {}
    for p in own:
        assert p.expert is not None
        pieces = _pieces(p, p.parameter.detach(), None, _bias_beside(p, here))
        apart.setdefault(p.expert, []).extend(pieces)
    for expert in sorted(apart):
        yield _whole(apart[expert], dtype)


_Piece = tuple[str, Tensor, Tensor | None]  # part (up, gate, down), matrix (out, in), bias


def _bias_beside(p: ParamInfo, here: Iterable[ParamInfo]) -> Tensor | None:
    return next((b.parameter.detach() for b in here if b.role == "bias" and p.name in weights_beside(b.name)), None)


def _pieces(p: ParamInfo, tensor: Tensor, expert: int | None, bias: Tensor | None) -> Iterator[_Piece]:
    """What is fused in one tensor, or in one expert's slice of it, each with its share of the bias."""
    if bias is not None and expert is not None:
        bias = bias.reshape(p.experts, -1)[expert] if bias.numel() % p.experts == 0 else None
    found = list(matrices(p, tensor, "expert" in p.layout.axes))
    fits = bias is not None and bias.numel() == sum(len(m) for _, m in found)
    shares = bias.flatten().chunk(len(found)) if bias is not None and fits else [None] * len(found)
    for (role, matrix), share in zip(found, shares, strict=True):
        yield ROLES[role].part, matrix, share


def _whole(pieces: Iterable[_Piece], dtype: torch.dtype) -> FeedForwardWeights:
    found = _assembled(pieces, dtype)
    assert found is not None
    return found


def _assembled(pieces: Iterable[_Piece], dtype: torch.dtype) -> FeedForwardWeights | None:
    found: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
    for part, matrix, bias in pieces:
        found.setdefault(part, []).append((matrix.to(dtype), None if bias is None else bias.to(dtype)))
    if "up" not in found or "down" not in found:
        return None
    joined = {part: torch.cat([m for m, _ in many], 1 if part == "down" else 0) for part, many in found.items()}
    biases: dict[str, Tensor] = {}
    for part, many in found.items():
        own = [b for _, b in many if b is not None]
        if len(own) == len(many):
            biases[part] = torch.stack(own).sum(0) if part == "down" else torch.cat(own)
    return FeedForwardWeights(joined["up"], joined.get("gate"), joined["down"], biases)
