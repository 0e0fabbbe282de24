"""Clipping a folded model: the weighted norm clips the same training, unit by unit clipping changes threshold and floor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_ as plain_clip

import mue
from mue.fold import agc, clip_grad_norm_, coefficients
from support.fold_model import Decoder, train
from support.fold_plans import distance, planned, twins
from support.precision import close

pytestmark = pytest.mark.usefixtures("in_float64")


def clipped(plan: mue.Plan, clip: Callable[[Decoder], Tensor], model: Decoder, steps: int = 120) -> int:
    """Trains with a clip; returns how many steps it acted on."""
    acted = 0

    def act() -> Tensor:
        nonlocal acted
        norm = clip(model)
        acted += bool(norm > LIMIT)
        return norm

    train(model, [torch.optim.AdamW(plan.param_groups(model))], steps, clip=act)
    return acted


LIMIT = 0.25


def test_clipping_commutes_under_the_weighted_norm_only() -> None:
    plan = planned("adamw")
    one, two, folded = twins(plan)
    acted = clipped(plan, lambda m: plain_clip(m.parameters(), LIMIT), one)
    c = coefficients(folded, two)
    assert clipped(folded, lambda m: clip_grad_norm_(m.parameters(), LIMIT, coefficients=c), two) == acted
    assert distance(one, two, folded) < 1e-12
    assert acted > 20, "the clip must act"
    one, two, folded = twins(plan)  # control: the plain norm clips another training
    clipped(plan, lambda m: plain_clip(m.parameters(), LIMIT), one, 60)
    clipped(folded, lambda m: plain_clip(m.parameters(), LIMIT), two, 60)
    assert distance(one, two, folded) > 1e-3


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_without_coefficients_it_is_torchs(norm_type: float) -> None:
    x, y = (torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2))
    unused = torch.nn.Parameter(torch.zeros(2))
    for limit in (0.1, 100.0):
        for p in (x, y):
            p.grad = torch.arange(12.0).view(3, 4) - 5
        ours = clip_grad_norm_(iter([x, y, unused]), limit, norm_type)
        found = [p.grad.clone() for p in (x, y)]
        for p in (x, y):
            p.grad = torch.arange(12.0).view(3, 4) - 5
        theirs = plain_clip([x, y, unused], limit, norm_type)
        assert close(ours, theirs, operations=24)
        for one, p in zip(found, (x, y), strict=True):
            assert close(one, p.grad, operations=24)
            assert not close(one, 1.01 * p.grad, operations=24)  # negative control
    assert clip_grad_norm_([], 1.0) == 0
    x.grad = torch.full((3, 4), float("nan"))
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        clip_grad_norm_(x, 1.0, error_if_nonfinite=True)


def test_agc_threshold_and_floor() -> None:
    """Clipped unit by unit, both forms clip the same: threshold/c², floor·c; threshold·c would not."""
    g, w, threshold, floor = torch.randn(50), torch.randn(50) * 0.1, 0.02, 0.05

    def clip(g: Tensor, w: Tensor, threshold: float, floor: float) -> Tensor:
        limit = threshold * w.abs().clamp_min(floor)
        return torch.where(g.abs() > limit, limit * g.sign(), g)

    for c in (0.37, 8 / 9, 3.0):
        expected = clip(g, w, threshold, floor)
        t, f = agc(threshold, floor, c)
        assert close(clip(g / c, w * c, t, f) * c, expected, operations=10)
        assert not close(clip(g / c, w * c, threshold * c, floor * c) * c, expected, operations=10)
