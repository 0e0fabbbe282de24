"""What a step along designed gradients was, of all that is done to matrices: orthogonal, matrix by matrix or as one, or none of it.

The oracle is algebra in float64: of a gradient U·diag(levels)·Vᵀ the polar factor is U·diag(signs)·Vᵀ, and that of several matrices
taken as one is the polar factor of their cores side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mue.checks.designed import LEVELS, Design
from mue.checks.probe import Probe
from mue.model.muon import A, B, C

SMALL = 0.5  # of the largest directions' step: what the smallest one gets at least after five steps of Keller's iteration (0.65)
PLAIN = 0.012  # what they get of a step along the gradient itself (0.004)
NOTHING = "no tensor moved by Muon"  # why a check of its steps is left out
ROWS = "every expert as one row of a matrix, or nothing orthogonalised"
SURE = 0.015  # averaged gradients in the second step that are larger than this have a sign that holds


def alike(a: Tensor, b: Tensor) -> float:
    """The cosine between two cores."""
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))


def signs(d: Design) -> Tensor:
    """The core of an orthogonal step, matrix by matrix."""
    return torch.diag_embed(d.first.sign())


def polar(x: Tensor) -> Tensor:
    """U·Vᵀ of the directions that are there; the others stay zero, as Newton and Schulz leave them."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    there: Tensor = u @ ((s > 1e-6 * s.max()).to(x)[:, None] * vh)
    return there


def as_one(d: Design) -> Iterator[tuple[str, Tensor]]:
    """What a first step would be if several matrices of the tensor were orthogonalised as one; (how, core)."""
    x = torch.diag_embed(d.first)
    experts, parts, r, _ = x.shape
    if parts > 1:
        rows = torch.stack([polar(one.reshape(parts * r, r)) for one in x])
        yield "its fused parts as one matrix", rows.reshape(x.shape)
    if experts == 1:
        return
    yield "all experts as one matrix, below each other", polar(x.reshape(-1, r)).reshape(x.shape)
    beside = polar(x.permute(1, 2, 0, 3).reshape(parts * r, experts * r))
    yield "all experts as one matrix, beside each other", beside.reshape(parts, r, experts, r).permute(2, 0, 1, 3)
    # with two rows alone that is a step along each expert's gradient
    yield ROWS, polar(x.reshape(experts, -1)).reshape(x.shape)


def taken_as(one: Probe) -> str:
    """How several matrices of a tensor were orthogonalised as one; empty where each was by itself."""
    assert one.design is not None and one.core is not None
    plain = smallest(one) < PLAIN
    # one row for each expert moves it along its gradient: weak directions stay weak
    found = [(alike(one.core, core), how) for how, core in as_one(one.design) if plain or how != ROWS]
    best, how = max(found, default=(0.0, ""))
    return how if best > 0.95 and best > alike(one.core, signs(one.design)) + 0.03 else ""


def along(one: Probe) -> float:
    """How far a first step lies along the gradient itself: the cosine."""
    assert one.design is not None and one.core is not None
    return alike(one.core, torch.diag_embed(one.design.first))


def orthogonal(one: Probe) -> bool:
    """Whether every direction of a matrix has the same step, the smallest ones of its gradient too."""
    assert one.design is not None and one.core is not None
    return alike(one.core, signs(one.design)) > 0.9 and smallest(one) > SMALL


def smallest(one: Probe) -> float:
    """The smallest directions' part of the largest ones' step; 1 where a matrix has one direction."""
    assert one.design is not None and one.core is not None
    step = (one.core.diagonal(dim1=-2, dim2=-1) * one.design.first.sign()).mean((0, 1))
    levels = [level for level, _ in LEVELS[: len(step)]]
    large = torch.stack([s for s, level in zip(step, levels, strict=True) if level == 1]).median()
    return min((float(s / large) for s, level in zip(step, levels, strict=True) if level < 1), default=1.0)


def iterations(one: Probe) -> int:
    """How many steps of Keller's iteration would leave the smallest direction where it is."""
    assert one.design is not None
    levels = torch.tensor([level for level, _ in LEVELS[: one.design.directions]]).double()
    x, seen, best = levels / levels.norm(), smallest(one), (math.inf, 0)
    for k in range(8):
        low = float(x.min() / x[0])
        best = min(best, (abs(math.log(max(seen, 1e-6) / low)), k))
        x = A * x + B * x**3 + C * x**5
    return best[1]


def size(one: Probe) -> float:
    """The largest directions' step against the planned one, of an orthogonal step; of the iteration alone 0.7 to 1.2."""
    assert one.design is not None and one.core is not None
    step = one.core.diagonal(dim1=-2, dim2=-1) * one.design.first.sign()
    large = [i for i, (level, _) in enumerate(LEVELS[: one.design.directions]) if level == 1]
    scales = torch.tensor(one.scales, dtype=torch.float64)
    return float((step[..., large].median(-1).values / scales).median())


def remembered(one: Probe) -> tuple[float, float]:
    """What the first gradient counted in the second step, of what the second did: between these two numbers.

    Nesterov's average of the second step is g2·(1+μ) + μ²·g1, momentum's alone g2 + μ·g1; the sign of a direction's step says on
    which side of -g2/g1 the ratio lies.
    """
    assert one.design is not None and one.core2 is not None
    step = one.core2.diagonal(dim1=-2, dim2=-1)
    first, second = one.design.first, one.design.second(float(one.group["momentum"]))
    low, high = -math.inf, math.inf
    for i, (level, averaged) in enumerate(LEVELS[: one.design.directions]):
        if level < 1 or abs(averaged) < SURE:
            continue
        turn = float((-second[..., i] / first[..., i]).mean())
        same = float((step[..., i] * first[..., i].sign()).mean()) > 0
        low, high = (max(low, turn), high) if same else (low, min(high, turn))
    return low, high


def counted(momentum: float, nesterov: bool) -> float:
    """What the first gradient counts in the second step with a momentum, of what the second does."""
    return momentum**2 / (1 + momentum) if nesterov else momentum
