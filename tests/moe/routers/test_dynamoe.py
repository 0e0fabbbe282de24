"""mue.moe.routers.dynamoe (2603.01697)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mue
from mue.moe.routers.base import RouterOptions
from mue.moe.routers.dynamoe import DynaMoERouter, above_percentile


@settings(max_examples=60, deadline=None, derandomize=True)
@given(experts=st.integers(1, 40), percentile=st.floats(0.0, 99.9), seed=st.integers(0, 2**31))
def test_a_percentile_of_the_same_token_fixes_the_number(experts: int, percentile: float, seed: int) -> None:
    """⌈(1 - τ/100)·N⌉ of N different logits are at or above the least one that no more than τ % lie below."""
    row = torch.rand(experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort().values
    place = math.floor(experts * percentile / 100 + 1e-9)  # so many lie below
    assert above_percentile(experts, percentile) == max(1, int((row >= row[min(place, experts - 1)]).sum()))
    assert above_percentile(experts, percentile) == max(1, math.ceil((1 - percentile / 100) * experts - 1e-9))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), experts=st.integers(2, 20), share=st.floats(0.0, 1.0))
def test_the_best_up_to_the_cap_by_a_softmax_over_them(seed: int, experts: int, share: float) -> None:
    torch.manual_seed(seed)
    cap = 1 + int(share * (above_percentile(experts, 50.0) - 1))
    router = DynaMoERouter(5, experts, cap, options=RouterOptions(route_scale=float(cap)))
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(12, 5)
    routing = router(x_TD)
    best = (x_TD.double() @ router.weight.double().T).topk(cap, dim=1)
    assert torch.equal(routing.expert_P.view(12, cap), best.indices)
    torch.testing.assert_close(
        routing.weight_P.view(12, cap).double(), cap * best.values.softmax(1), rtol=1e-5, atol=1e-6
    )


def test_evaluation_with_another_number() -> None:
    router, x_TD = DynaMoERouter(5, 12, 3, options=RouterOptions(route_scale=3.0)).eval(), torch.randn(7, 5)
    router.set_active(8)
    assert router(x_TD).slots == 8 and router.train()(x_TD).slots == 3


def test_a_percentile_that_fewer_pass_is_refused() -> None:
    common = {"width": 32, "expert": 16, "layers": 1, "head_dim": 16, "router": "dynamoe"}
    with pytest.raises(ValueError, match=r"of 8 experts 2 pass it, fewer than 3 active"):
        mue.MoE.parse("8e3a", router_settings={"percentile": 80.0}, **common)
    with pytest.raises(ValueError, match="percentile of the dynamoe router must be"):
        mue.MoE.parse("8e3a", router_settings={"percentile": 100.0}, **common)
    assert mue.MoE.parse("8e2a", router_settings={"percentile": 80.0}, **common).active == 2
