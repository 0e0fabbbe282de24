"""mue.moe.routers.elastic (2509.21892): draws, their frequencies, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mue
from mue.moe import Router, gate_moments
from mue.moe.routers.base import RouterInput, RouterOptions
from mue.moe.routers.elastic import ElasticRouter
from mue.moe.routers.ops import select_top


def made(experts: int = 16, active: int = 2, seed: int = 0, layer: int = 0, **given: object) -> ElasticRouter:
    options = RouterOptions(route_scale=float(active), settings=given, seed=seed, layer=layer)
    router = ElasticRouter(6, experts, active, options=options, score=str(given.get("score", "softmax")))  # type: ignore[arg-type]
    torch.nn.init.normal_(router.weight)
    return router


def ranks(router: ElasticRouter, x_TD: Tensor, draw: int = 0) -> Tensor:
    """(T, K) the ranks of the chosen experts among the token's, from 0."""
    chosen_TK = router(x_TD, RouterInput(draw=draw)).expert_P.view(len(x_TD), -1)
    order_TN = select_top(x_TD @ router.weight.T, router.experts)
    return (order_TN[:, None, :] == chosen_TK[:, :, None]).long().argmax(2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    active=st.integers(2, 6),
    more=st.integers(0, 8),
    score=st.sampled_from(["sigmoid", "softmax"]),
    random_pool=st.booleans(),
)
def test_every_draw_is_of_the_pool_and_distinct(
    seed: int, active: int, more: int, score: str, random_pool: bool
) -> None:
    """Weights are the chosen ones' scores over their sum, in float64."""
    torch.manual_seed(seed)
    router = made(16, active, seed, pool=active + more, score=score, random_pool=random_pool)
    x_TD = torch.randn(30, 6)
    chosen_TK = ranks(router, x_TD)
    assert (chosen_TK < active + more).all() and (chosen_TK.diff(dim=1) > 0).all()
    routing = router(x_TD)
    logit_TN = x_TD.double() @ router.weight.double().T
    score_TN = logit_TN.sigmoid() if score == "sigmoid" else logit_TN.softmax(1)
    picked_TK = score_TN.gather(1, routing.expert_P.view(30, -1))
    expected = active * picked_TK / picked_TK.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weight_P.view(30, -1).double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_a_pool_of_the_active_ones_is_top_k(score: str) -> None:
    """To the bit, in training; a larger pool is not (the control)."""
    torch.manual_seed(0)
    router, plain = made(active=3, pool=3, score=score), Router(6, 16, 3, score=score, route_scale=3.0)  # type: ignore[arg-type]
    plain.weight.data = router.weight.data
    x_TD = torch.randn(40, 6)
    a, b = router(x_TD), plain(x_TD)
    assert torch.equal(a.expert_P, b.expert_P) and torch.equal(a.weight_P, b.weight_P)
    wider = made(active=3, pool=6, score=score, random_pool=False)
    wider.weight.data = router.weight.data
    assert not torch.equal(wider(x_TD).expert_P, b.expert_P)
    assert torch.equal(wider.eval()(x_TD).expert_P, b.expert_P)  # in evaluation it is


def frequencies(router: ElasticRouter, steps: int, tokens: int) -> tuple[Tensor, Tensor]:
    """(C,) how often each rank is drawn, and (C, C) each pair of ranks, of one token."""
    pool, x_TD = 6, torch.randn(tokens, 6)
    one_C, two_CC = torch.zeros(pool), torch.zeros(pool, pool)
    for _ in range(steps):
        hit_TC = torch.nn.functional.one_hot(ranks(router, x_TD), pool).sum(1).float()
        one_C += hit_TC.sum(0)
        two_CC += hit_TC.T @ hit_TC
        router.end_step_(0.0)
    return one_C / (steps * tokens), two_CC / (steps * tokens)


def test_pairs_of_a_fixed_pool_are_drawn_as_often_as_the_formula_says() -> None:
    """C(k, 2)/C(C, 2) of any pair, and k/C of any expert, to 4σ."""
    torch.manual_seed(1)
    one_C, two_CC = frequencies(made(pool=6, random_pool=False), 20, 200)
    draws, pair = 4000, math.comb(2, 2) / math.comb(6, 2)
    assert (one_C - 2 / 6).abs().max() < 4 * math.sqrt(1 / 3 * 2 / 3 / draws)
    off = two_CC[~torch.eye(6, dtype=torch.bool)]
    assert (off - pair).abs().max() < 4.5 * math.sqrt(pair * (1 - pair) / draws)  # of 15 pairs


def test_a_random_pool_draws_the_first_ranks_more_often() -> None:
    """k = 2, pools of 2 to 6, evenly: ranks 1, 3 and 6 in .58, .38 and .067 of the draws, the pair (1, 2) in .333. A step draws one
    size for all tokens, so the error is that of the steps."""
    torch.manual_seed(2)
    one_C, two_CC = frequencies(made(pool=6), 600, 30)
    assert one_C[[0, 2, 5]].tolist() == pytest.approx([0.58, 0.38, 0.067], abs=0.04)
    assert two_CC[0, 1].item() == pytest.approx(1 / 3, abs=0.06) and two_CC[4, 5].item() < 0.04
    expected = [sum(2 / size for size in range(2, 7) if size > rank) / 5 for rank in range(6)]
    assert one_C.tolist() == pytest.approx(expected, abs=0.04)


def test_a_draw_is_a_function_of_seed_layer_step_and_pass() -> None:
    torch.manual_seed(3)
    x_TD, router = torch.randn(300, 6), made(pool=6, random_pool=False)
    weights, before = router.weight.data, ranks(router, x_TD)
    assert torch.equal(before, ranks(router, x_TD)) and torch.equal(before[:7], ranks(router, x_TD[:7]))
    others = [made(seed=1, pool=6, random_pool=False), made(layer=1, pool=6, random_pool=False)]
    for other in others:
        other.weight.data = weights
        assert not torch.equal(before, ranks(other, x_TD))
    assert not torch.equal(before, ranks(router, x_TD, draw=1))
    router.end_step_(0.0)
    assert not torch.equal(before, ranks(router, x_TD))
    resumed = made(pool=6, random_pool=False)
    resumed.load_state_dict(router.state_dict())
    state = torch.get_rng_state()
    assert torch.equal(ranks(resumed, x_TD), ranks(router, x_TD))
    assert torch.equal(state, torch.get_rng_state())  # none of it is torch's own dice


def test_evaluation_takes_the_best_of_any_number() -> None:
    torch.manual_seed(4)
    router, x_TD = made(pool=6).eval(), torch.randn(50, 6)
    for active in range(1, 17):
        router.set_active(active)
        assert torch.equal(ranks(router, x_TD), torch.arange(active).expand(50, -1))
        assert gate_moments(router(x_TD))[0] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="active=17 exceeds experts=16"):
        router.set_active(17)


def test_load_counts_what_was_drawn_and_the_bias_moves() -> None:
    router = made(pool=6)
    router(torch.randn(100, 6))
    assert router.load.sum() == 200
    router.end_step_(1e-3)
    assert (
        router.load.sum() == 0 and router.balance_bias.abs().max() == pytest.approx(1e-3 * 2 / 16) and router.step == 1
    )


def test_refusals_name_the_numbers() -> None:
    common = {"width": 32, "expert": 16, "layers": 1, "head_dim": 16, "router": "elastic"}
    for given_, message in (
        ({"pool": 1}, "pool = 1 of the elastic router must be at least the 2 active and at most the 8 experts"),
        ({"pool": 9}, "pool = 9 of the elastic router"),
        ({"pool": 2.5}, "pool of the elastic router must be a whole number"),
        ({"pol": 4}, "did you mean 'pool'"),
    ):
        with pytest.raises(ValueError, match=message):
            mue.MoE.parse("8e2a", router_settings=given_, **common)
