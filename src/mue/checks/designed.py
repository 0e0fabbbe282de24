"""Gradients of known singular values, which tell from one or two steps what an optimizer does with a matrix.

Every matrix of a tensor (each expert, each fused part) has the gradient U·diag(levels)·Vᵀ with the same U and V, so that what an
optimizer makes of it is read off the small core UᵀΔV: of an orthogonal step a diagonal of ±1, however large the matrix is.

Shape suffixes: E experts (or 1), P fused parts, R directions, O rows, I columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mue.layouts.layout import ParamInfo
from mue.model.matrices import Matrices, join, matrices_of, split
from mue.plan.plan import PlanData
from mue.rules.roles import ROLES

# By direction, the most telling first: the singular value of the first gradient, and what is to be averaged in the second step.
# Five steps of Keller's iteration bring 0.004 to 0.7, four to 0.2; a second step of ±0.02 turns its sign where the momentum is
# another by 0.03, and of ±0.05 by 0.07.
LEVELS = ((1, 0.05), (1, -0.05), (0.004, 0.3), (1, 1), (0.03, -1), (1, -0.3), (1, 0.02), (1, -0.02))
# Matrices of one tensor by turns: what orthogonalises them as one gives the smaller ones less.
SIZES = (1.0, 1 / 3)
NORM = 1e-2  # of all gradients together: above what Muon takes for zero


@dataclass(frozen=True)
class Design:
    """The gradients of one matrix or stack of matrices, and what a change is in their directions.

    Attributes:
        how: the matrices that lie in the tensor. shape: that ``how`` speaks of; rows and the rest, where it is no hidden matrix.
        left: (O, R) of each part. right: (I, R). sizes: (E, P), by what each matrix's levels are multiplied, signs left out.
        signs: (E, R), odd experts have other signs. amplitude: of the whole tensor.
    """

    how: Matrices
    shape: tuple[int, ...]
    left: Sequence[Tensor]
    right: Tensor
    sizes: Tensor
    signs: Tensor
    amplitude: float

    @property
    def directions(self) -> int:
        return self.right.shape[1]

    @property
    def first(self) -> Tensor:
        """Singular values of the first gradient, up to the amplitude."""
        return self._spread(torch.tensor([one for one, _ in LEVELS], dtype=torch.float64))

    def second(self, momentum: float) -> Tensor:
        """Those of the second, of which Nesterov's average with that momentum is LEVELS' second column."""
        columns = (torch.tensor(c, dtype=torch.float64) for c in zip(*LEVELS, strict=True))
        first, averaged = columns
        # m = μ·g1 + g2 (up to 1-μ), and a step ahead g2·(1+μ) + μ²·g1
        return self._spread((averaged - momentum**2 * first) / (1 + momentum))

    def _spread(self, levels_R: Tensor) -> Tensor:
        one_E1R = self.signs[:, None] * levels_R[: self.directions]
        return self.sizes[:, :, None] * one_E1R

    def gradient(self, levels_EPR: Tensor, like: Tensor) -> Tensor:
        """The gradient with these singular values, of the parameter's shape and type."""
        wide = torch.promote_types(like.dtype, torch.float32)
        scaled = (levels_EPR * self.amplitude).to(like.device, wide)
        right_RI = self.right.mT.to(like.device, wide)
        parts = [(left_OR.to(like.device, wide) * scaled[:, k, None]) @ right_RI for k, left_OR in enumerate(self.left)]
        empty = torch.empty(self.shape, dtype=wide, device=like.device)
        return join(parts, self.how, empty).reshape(like.shape).to(like.dtype)

    def core_EPRR(self, change: Tensor) -> Tensor:
        """A change of the parameter in the directions of its gradients, in float64."""
        wide = torch.promote_types(change.dtype, torch.float32)
        parts = split(change.to(wide).reshape(self.shape), self.how)
        right_IR = self.right.to(change.device, wide)
        cores = [
            left_OR.to(change.device, wide).mT @ (x_EOI @ right_IR)
            for left_OR, x_EOI in zip(self.left, parts, strict=True)
        ]
        return torch.stack(cores, dim=1).cpu().double()


def design(plan: PlanData, p: ParamInfo, total: int) -> Design | None:
    """The gradients of one tensor; None for a vector.

    Args:
        p: a parameter of the planned model. total: elements of all parameters that are stepped.
    """
    if p.parameter.dim() < 2 or min(p.parameter.shape) == 0:
        return None
    how, shape = _matrices(plan, p)
    rows = how[2]
    pieces = split(torch.empty(shape, device="meta"), how)
    count, fan_in = pieces[0].shape[0], pieces[0].shape[2]
    directions = min(len(LEVELS), fan_in, *rows)
    seed = int.from_bytes(hashlib.sha256(p.name.encode()).digest()[:8], "little") >> 1
    dice = torch.Generator().manual_seed(seed)

    def orthonormal(n: int) -> Tensor:
        noise = torch.randn(n, directions, generator=dice, dtype=torch.float64)
        basis, _ = torch.linalg.qr(noise)
        return basis  # type: ignore[no-any-return]

    sizes_EP = torch.tensor([[SIZES[(e + k) % 2] for k in range(len(rows))] for e in range(count)]).double()
    signs_ER = torch.tensor([[-1.0 if e % 2 and i % 2 else 1.0 for i in range(directions)] for e in range(count)])
    levels = torch.tensor([one for one, _ in LEVELS[:directions]]).double()
    norm = float(sizes_EP.norm() * levels.norm())
    amplitude = NORM * (p.parameter.numel() / total) ** 0.5 / norm
    return Design(
        how, shape, [orthonormal(n) for n in rows], orthonormal(fan_in), sizes_EP, signs_ER.double(), amplitude
    )


def _matrices(plan: PlanData, p: ParamInfo) -> tuple[Matrices, tuple[int, ...]]:
    """The matrices of a hidden tensor; anything else is one, as it lies in memory."""
    if ROLES[p.role].hidden or p.layout.stacked > 1:
        try:
            return matrices_of(plan, p), tuple(p.parameter.shape)
        except ValueError:  # parts of unknown sizes, for which no Muon is planned
            pass
    rows = p.parameter.shape[0]
    return (("out", "in"), 1, (rows,)), (rows, p.parameter.numel() // rows)
