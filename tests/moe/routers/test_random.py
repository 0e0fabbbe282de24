"""mue.moe.routers.random: uniform without replacement, and a pure function of seed, step, layer and place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mue.moe.routers.base import RouterInput, RouterOptions
from mue.moe.routers.random import RandomRouter


def made(experts: int = 16, active: int = 4, groups: int = 1, **options: object) -> RandomRouter:
    return RandomRouter(4, experts, active, groups, RouterOptions(**options))  # type: ignore[arg-type]


def drawn(router: RandomRouter, tokens: int = 300, draw: int = 0) -> Tensor:
    routing = router(torch.zeros(tokens, 4), RouterInput(draw=draw))
    return routing.expert_P.view(tokens, -1)


@pytest.mark.parametrize(("experts", "active", "groups"), [(16, 4, 1), (12, 6, 3), (5, 5, 1), (8, 1, 1)])
def test_uniform_and_without_replacement(experts: int, active: int, groups: int) -> None:
    """Every token has a different experts, a/g of each group; the load of each is within 4σ of its share, over places and steps."""
    router, tokens, steps = made(experts, active, groups), 1000, 10
    load_N = torch.zeros(experts)
    for _ in range(steps):
        chosen_TK = drawn(router, tokens)
        assert all(len(set(row)) == active for row in chosen_TK.tolist())
        for group in range(groups):
            assert ((chosen_TK // (experts // groups) == group).sum(1) == active // groups).all()
        load_N += torch.bincount(chosen_TK.flatten(), minlength=experts)
        router.end_step_(0.0)
    share = active / experts
    assert (load_N - tokens * steps * share).abs().max() <= 4 * math.sqrt(tokens * steps * share * (1 - share))


def test_a_draw_is_a_function_of_seed_step_layer_place_and_pass() -> None:
    """Asked again it is the same (a recomputed forward, another process, a shorter batch); each of the five changes it."""
    one, other = made(seed=1, layer=2), made(seed=1, layer=2)
    before = drawn(one)
    assert torch.equal(before, drawn(one)) and torch.equal(before, drawn(other))
    assert torch.equal(before[:7], drawn(one, 7))
    expected = 1 - 1 / 16  # share of slots that differ by chance, about: order within a token is random, too
    for changed in (drawn(made(seed=2, layer=2)), drawn(made(seed=1, layer=3)), drawn(one, draw=1), before.roll(1, 0)):
        assert abs((before != changed).float().mean() - expected) < 0.05
    one.end_step_(0.0)
    assert abs((before != drawn(one)).float().mean() - expected) < 0.05
    resumed = made(seed=1, layer=2)
    resumed.load_state_dict(one.state_dict())
    assert torch.equal(drawn(one), drawn(resumed)) and not torch.equal(drawn(one), drawn(other))


def test_evaluation_draws_the_same_at_every_step() -> None:
    router = made().eval()
    first = drawn(router)
    router.end_step_(0.0)
    assert torch.equal(first, drawn(router)) and torch.equal(first, drawn(router, draw=1))
    assert not torch.equal(first, drawn(router.train()))  # the control: training moves on


def test_weights_are_even_and_sum_to_the_route_scale() -> None:
    routing = made(route_scale=4.0)(torch.randn(50, 4, dtype=torch.float64))
    assert (routing.weight_P == 1.0).all() and routing.weight_P.dtype == torch.float64
    assert routing.stats["gate_sum"].item() == 4 and not list(made().parameters())
