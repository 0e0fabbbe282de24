"""Gradients of known singular values, and what a step along them is, against singular value decompositions in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mue
from mue.checks.designed import LEVELS, NORM, Design, design
from mue.checks.matrix_step import as_one, counted, polar
from mue.checks.probe import SCALES
from mue.layouts.layout import Layout, ParamInfo
from mue.layouts.of_model import placed
from mue.model.matrices import split
from support.wiring.case import case
from support.wiring.muons import SCALES as THEIRS


@cache
def of_model() -> tuple[mue.Plan, list[ParamInfo]]:
    c = case("mue hybrid", muon=True)
    return c.plan, placed(c.model)


@pytest.mark.parametrize("role", ["expert_up", "attention_q", "embedding", "router"])
def test_a_gradient_has_the_singular_values_that_it_was_made_of(role: str) -> None:
    plan, params = of_model()
    p = next(p for p in params if p.role == role)
    d = design(plan, p, total=p.parameter.numel())
    assert d is not None
    gradient = d.gradient(d.first, p.parameter.detach().double())
    for e, x in enumerate(split(gradient.reshape(d.shape), d.how)[0]):
        found = torch.linalg.svdvals(x)[: d.directions]
        wanted = (d.first[e, 0].abs() * d.amplitude).sort(descending=True).values
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert torch.allclose(d.core_EPRR(gradient), torch.diag_embed(d.first) * d.amplitude, atol=1e-12)
    assert abs(float(gradient.norm()) / NORM - 1) < 1e-9  # all of the norm, where the tensor is all there is


@given(st.floats(0.0, 0.99))
def test_the_second_gradient_makes_nesterovs_average_what_it_is_designed_to_be(momentum: float) -> None:
    """By the recursion itself; without the look-ahead it is another (control)."""
    d, _ = fused()
    first, second = d.first[0, 0], d.second(momentum)[0, 0]
    buffer = momentum * first + second
    ahead = second + momentum * buffer
    assert torch.allclose(ahead, torch.tensor([x for _, x in LEVELS[: d.directions]]).double(), atol=1e-12)
    assert momentum < 0.1 or not torch.allclose(buffer, ahead, atol=1e-3)
    for nesterov, averaged in ((True, ahead), (False, buffer)):
        ratio = counted(momentum, nesterov)
        assert torch.allclose(averaged / averaged[0], (second + ratio * first) / (second + ratio * first)[0])


class Experts(nn.Module):
    """Four experts with gate and up in one tensor, as ``transformers`` has them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 24, 10))


@cache
def fused() -> tuple[Design, Tensor]:
    info = ParamInfo(
        "w", Experts().w, Layout("w", "expert_gate", ("expert", "out", "in"), parts=("expert_gate", "expert_up"))
    )
    target = mue.MoE.parse("4e2a", width=10, expert=12, layers=1, head_dim=5)
    base = mue.Dense(width=10, ffn=12, layers=1, head_dim=5)
    plan = mue.transfer(base, target, mue.HParams(0.02, 0.1, 0.1, optimizer="muon"))
    d = design(plan, info, 1000)
    assert d is not None and d.first.shape[:2] == (4, 2)
    return d, d.gradient(d.first, torch.zeros(4, 24, 10, dtype=torch.float64))


# How the tensor lies as one matrix (or as one of each expert), and back.
FLAT: dict[str, tuple[Any, Any]] = {
    "its fused parts as one matrix": (lambda t: t, lambda t: t),
    "all experts as one matrix, below each other": (lambda t: t.reshape(-1, 10), lambda t: t.reshape(4, 24, 10)),
    "all experts as one matrix, beside each other": (
        lambda t: t.permute(1, 0, 2).reshape(24, 40),
        lambda t: t.reshape(24, 4, 10).permute(1, 0, 2),
    ),
    "every expert as one row of a matrix, or nothing orthogonalised": (
        lambda t: t.reshape(4, -1),
        lambda t: t.reshape(4, 24, 10),
    ),
}


def test_matrices_taken_as_one_are_seen_in_their_cores() -> None:
    """The polar factor of the whole tensor, by a decomposition of all of it, has the core that is derived from the cores alone."""
    d, gradient = fused()
    found = dict(as_one(d))
    assert found.keys() == FLAT.keys()
    for how, (flat, back) in FLAT.items():
        whole = flat(gradient)
        step = back(torch.stack([polar(x) for x in whole]) if whole.dim() == 3 else polar(whole))
        assert torch.allclose(d.core_EPRR(step), found[how], atol=1e-9), how
        alone = torch.diag_embed(d.first.sign())
        assert (found[how] - alone).norm() > 0.2 * alone.norm(), how


def test_conventions_are_those_of_others() -> None:
    for name, factor in SCALES.items():
        assert all(abs(factor(o, i) - THEIRS[name](o, i)) < 1e-12 for o, i in ((3, 7), (7, 3), (5, 5)))
