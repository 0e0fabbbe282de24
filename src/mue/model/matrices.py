"""Which matrices lie in a tensor: experts along an axis, projections fused into one, axes in any order. Muon moves one at a time.

A :data:`Matrices` is plain and hashable, so that an optimizer's group has one and its state dict stays plain, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mue.layouts.layout import HEADS, ROWS, UNKNOWN, ParamInfo
from mue.plan.plan import PlanData
from mue.plan.update_scale import matrix_shape
from mue.rules.roles import ROLES

Matrices = tuple[tuple[str, ...], int, tuple[int, ...]] | tuple[tuple[str, ...], int, tuple[int, ...], int]
"""(what each axis is, as layouts say it; experts in a merged axis; fan-outs of the fused parts, in order). A fourth number: in how many
turns the parts come along fan-out, a piece of each in every turn."""


def matrices_of(plan: PlanData, p: ParamInfo) -> Matrices:
    """The matrices in one parameter.

    Args:
        plan: has the sizes of fused parts. p: a matrix, of a hidden role.

    Raises:
        ValueError: parts whose sizes do not add up to the tensor's, or whose order is not known; an axis that is neither fan-in,
            fan-out nor experts.
    """
    if "vector" in p.layout.axes:
        raise ValueError(
            f"{p.name} has an axis that is no matrix's, and Muon moves matrices: leave its kind out of muon_moves"
        )
    block = plan.target.per_layer[p.layer or 0]
    sizes = tuple(matrix_shape(ROLES[part], plan.target, block)[0] for part in p.layout.parts)
    many = len(sizes)
    if many > 1 and p.layout.order == UNKNOWN:
        raise ValueError(
            f"{p.name} holds {', '.join(p.layout.parts)} in one tensor, and in which order its rows lie was not found, so Muon cannot move"
            " them one by one: give a row of your own with its order (model.layout_rows), or each projection a tensor of its own"
        )
    if many and sum(sizes) != p.fan_out:
        shared = all(ROLES[part].kind == "shared" for part in p.layout.parts)
        if not shared or p.fan_out % many or len(set(sizes)) > 1:
            raise ValueError(
                f"{p.name} holds {', '.join(p.layout.parts)} of {sizes} rows in one tensor of {p.fan_out}: where one ends and the next"
                " begins is not known, so Muon cannot move them one by one; give each a tensor of its own"
            )
        sizes = (p.fan_out // many,) * many  # several shared experts as one, gate and up as wide as each other
    turns = {ROWS: p.fan_out // max(many, 1), HEADS: plan.target.num_kv_heads}.get(p.layout.order, 1) if many > 1 else 1
    if any(size % turns for size in sizes):
        raise ValueError(
            f"{p.name} holds {', '.join(p.layout.parts)} of {sizes} rows in {turns} turns (order = {p.layout.order!r}), which do not divide"
            " them: correct the order of its row"
        )
    how = p.layout.axes, p.layout.stacked, sizes or (p.fan_out,)
    return how if turns == 1 else (*how, turns)


def unpacked(how: Matrices) -> tuple[tuple[str, ...], int, tuple[int, ...], int]:
    """(axes, experts in a merged axis, fan-outs of the parts, turns)."""
    return how[0], how[1], how[2], how[3] if len(how) == 4 else 1


def stacked_once_more(how: Matrices) -> Matrices:
    """The same with one more axis of matrices in front."""
    axes = ("expert", *how[0])
    return (axes, how[1], how[2], how[3]) if len(how) == 4 else (axes, how[1], how[2])


def split(tensor: Tensor, how: Matrices) -> list[Tensor]:
    """A tensor as its matrices: one (E, out, in) for each fused part, E the experts that lie in it (or 1)."""
    axes, experts, sizes, turns = unpacked(how)
    whole, _ = _ordered(tensor, axes, experts)
    count, out, fan_in = _sizes(whole, axes)
    if turns == 1:
        return list(torch.split(whole.reshape(count, out, fan_in), list(sizes), dim=1))
    pieces = torch.split(whole.reshape(count, turns, out // turns, fan_in), [size // turns for size in sizes], dim=2)
    return [piece.reshape(count, size, fan_in) for piece, size in zip(pieces, sizes, strict=True)]


def join(parts: Sequence[Tensor], how: Matrices, like: Tensor) -> Tensor:
    """The inverse of :func:`split`.

    Args:
        parts: as :func:`split` gives them. like: a tensor of the wanted shape.
    """
    axes, experts, _, turns = unpacked(how)
    ordered, order = _ordered(like, axes, experts)
    pieces = [part.reshape(part.size(0), turns, -1, part.size(2)) for part in parts]
    whole = parts[0] if len(parts) == 1 else torch.cat(pieces, dim=2)
    back = [order.index(i) for i in range(len(order))]
    return whole.reshape(ordered.shape).permute(back).reshape(like.shape)


def _unmerged(axes: tuple[str, ...]) -> list[str]:
    """A merged axis, ``expert*in``, as the two that it is made of."""
    return [word for axis in axes for word in axis.split("*")]


def _ordered(tensor: Tensor, axes: tuple[str, ...], experts: int) -> tuple[Tensor, list[int]]:
    """The tensor with experts first, then fan-out, then fan-in; and which axis each was."""
    merged = next((i for i, axis in enumerate(axes) if "*" in axis), None)
    if merged is not None:
        tensor = tensor.reshape(*tensor.shape[:merged], experts, -1, *tensor.shape[merged + 1 :])
    words = _unmerged(axes)
    order = [i for kind in ("expert", "out", "in") for i, word in enumerate(words) if word == kind]
    return tensor.permute(order), order


def _sizes(ordered: Tensor, axes: tuple[str, ...]) -> tuple[int, int, int]:
    words = sorted(_unmerged(axes), key=("expert", "out", "in").index)
    count, out, fan_in = (
        math.prod(n for n, word in zip(ordered.shape, words, strict=True) if word == kind)
        for kind in ("expert", "out", "in")
    )
    return count, out, fan_in
