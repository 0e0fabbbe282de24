"""The rectified flow: its identities, and samplers on a Gaussian, whose flow is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mue.lab.models import flow
from support.diffusion import BASE, batch_of, model_of, plan_of

MEAN, STD = 0.7, 0.4


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), low=st.floats(0, 0.5), high=st.floats(0.5, 1))
def test_identities(seed: int, low: float, high: float) -> None:
    """x_0 and ε from x_t and v, in float64, at any t; v is the slope between any two points of the way."""
    draw = torch.Generator().manual_seed(seed)
    image, noise = (torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    v, t = flow.velocity(image, noise), torch.tensor([low, high], dtype=torch.float64)
    x = flow.noised(image, noise, t)
    there, each = torch.rand(2, generator=draw, dtype=torch.float64), (slice(None), None, None, None)
    assert torch.allclose(x - t[each] * v, image, rtol=0, atol=1e-14)
    assert torch.allclose(x + (1 - t)[each] * v, noise, rtol=0, atol=1e-14)
    assert torch.allclose(flow.noised(image, noise, there) - x, (there - t)[each] * v, rtol=0, atol=1e-14)
    ends = flow.noised(image, noise, torch.zeros(2)), flow.noised(image, noise, torch.ones(2))
    assert torch.equal(ends[0], image) and torch.equal(ends[1], noise)


def gaussian(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """E[ε − x_0 | x_t] for images of N(m, s²) and standard noise; its flow takes noise z to m + s·z."""
    t = time[:, None, None, None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_samplers_converge_at_their_order(sampler: str, order: int) -> None:
    noise = torch.linspace(-2, 2, 64, dtype=torch.float64).view(4, 1, 4, 4)
    exact = MEAN + STD * noise
    errors = [(flow.follow(gaussian, noise, steps, sampler) - exact).abs().max().item() for steps in (32, 64, 128, 256)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(slope - order) < 0.15 for slope in slopes), (errors, slopes)


def test_guidance_leads_away_from_no_class() -> None:
    model, (x, t, c, _) = model_of(plan_of(BASE), awake=0.3).double(), batch_of(dtype=torch.float64)
    c = c % model.unconditional
    own, none = (model(x, t, label).logits for label in (c, torch.full_like(c, model.unconditional)))
    for w in (1.0, 0.0, 3.0):
        assert torch.allclose(flow.guided(model, c, w)(x, t), none + w * (own - none), atol=1e-12)
    assert not torch.allclose(own, none)


def test_an_unknown_sampler_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match="heun"):
        flow.follow(gaussian, torch.zeros(1, 1, 2, 2), 4, "huen")
    with pytest.raises(ValueError, match="steps"):
        flow.follow(gaussian, torch.zeros(1, 1, 2, 2), 0, "heun")
