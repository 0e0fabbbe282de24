"""Selection, statistics and gates by the kernel: torch's, to the index and to rounding."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mue.moe import (
    Router,
    Routing,
)
from mue.moe.backends import native_route as route
from mue.moe.routers.ops import select_top


@pytest.mark.usefixtures("kernel")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 9), st.integers(1, 90), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_the_kernel_selects_and_counts_as_torch_does(
    tokens: int, size: int, each: int, groups: int, values: int
) -> None:
    """To the index, with ties, infinities and NaNs; few experts and many; the statistics as well."""
    active, experts = min(each, size) * groups, size * groups
    generator = torch.Generator().manual_seed(size)
    table = torch.tensor([0.0, -0.0, math.nan, -math.inf, 0.5, -0.5])
    score_TN = torch.randn(tokens, experts, generator=generator)
    if values:
        score_TN = table[torch.randint(values + 1, (tokens, experts), generator=generator)]
    weight_TK = torch.rand(tokens, active, generator=generator).round(decimals=1)
    with FlopCounterMode(display=False):  # watched, torch computes
        assert route.select_top(score_TN, active, groups) is None
        expected = select_top(score_TN, active, groups)
    found = route.select_top(score_TN, active, groups)
    assert found is not None and torch.equal(found, expected)
    routing = Routing.from_topk(expected, weight_TK, experts)
    stats = route.routing_stats(routing)
    assert stats is not None and stats.keys() == routing.stats.keys()
    for name, value in routing.stats.items():
        assert stats[name].dtype == value.dtype
        torch.testing.assert_close(stats[name], value, rtol=1e-5, atol=1e-7)
    if tokens and size > 1 and not values:  # negative control: no value is the largest and the smallest
        assert not torch.equal(route.select_top(-score_TN, active, groups), found)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_kernels_weights_are_torchs(score: Literal["sigmoid", "softmax"]) -> None:
    """And their gradients, also where every sigmoid underflows; against float64."""
    torch.manual_seed(0)
    router = Router(8, 12, 3, score=score, route_scale=3.0)
    logit_TN = torch.randn(50, 12) * 4 - torch.tensor([0.0] * 40 + [200.0] * 10)[:, None]
    dweight_TK, found = torch.randn(50, 3), []
    expert_TK = select_top(logit_TN, 3)
    for kind in (torch.float32, torch.float64):
        leaf = logit_TN.to(kind).requires_grad_()
        weight_TK = router._weights(leaf, torch.sigmoid(leaf), expert_TK, 3.0)
        assert ("NativeGates" in weight_TK.grad_fn.name()) == (kind == torch.float32)
        found.append([weight_TK, *torch.autograd.grad(weight_TK, leaf, dweight_TK.to(kind))])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    other = route.gates(logit_TN, expert_TK, score != "sigmoid", 3.0)
    assert other is not None and (other - found[0][0]).abs().max() > 0.01  # negative control: the score is seen
