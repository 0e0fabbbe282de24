"""mue.moe.routers.hash: fixed by token id, balanced over ids."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mue.moe.routers.base import RouterInput, RouterOptions
from mue.moe.routers.hash import HashRouter


def experts_of(router: HashRouter, token_T: Tensor) -> Tensor:
    routing = router(torch.randn(token_T.numel(), router.width), RouterInput(token_T))
    return routing.expert_P.view(-1, routing.slots)


@pytest.mark.parametrize(("experts", "active", "groups"), [(8, 2, 1), (12, 3, 3), (7, 7, 1), (6, 1, 1), (16, 8, 4)])
def test_any_run_of_ids_gives_each_expert_its_share(experts: int, active: int, groups: int) -> None:
    router, size = HashRouter(4, experts, active, groups), experts // groups
    chosen_TK = experts_of(router, torch.arange(40 * size))
    assert all(len(set(row)) == active for row in chosen_TK.tolist())
    for first in range(0, 40 * size, size):
        run = chosen_TK[first : first + size]
        assert (torch.bincount(run.flatten(), minlength=experts) == active // groups).all()
    for group in range(groups):
        assert ((chosen_TK // size == group).sum(1) == active // groups).all()


def test_the_experts_are_those_of_the_id_and_nothing_else() -> None:
    router = HashRouter(4, 16, 4, options=RouterOptions(seed=1, layer=2, route_scale=4.0))
    token_T = torch.randint(1000, (500,))
    once, again = experts_of(router, token_T), experts_of(HashRouter(9, 16, 4, options=router.options), token_T.flip(0))
    assert torch.equal(once, again.flip(0))
    assert torch.equal(once, experts_of(router.eval(), token_T))
    router.end_step_(0.1)
    assert torch.equal(once, experts_of(router.train(), token_T)) and not list(router.state_dict())
    for other in ({"seed": 2, "layer": 2}, {"seed": 1, "layer": 3}):  # negative controls
        different = experts_of(HashRouter(4, 16, 4, options=RouterOptions(**other)), token_T)  # type: ignore[arg-type]
        assert 0.6 < (once != different).float().mean() <= 1


def test_the_load_of_uniform_ids_is_uniform() -> None:
    """Within 4σ of a multinomial (an upper bound: ids of one run repel each other)."""
    torch.manual_seed(0)
    router, tokens = HashRouter(4, 16, 4), 1 << 14
    load_N = torch.bincount(experts_of(router, torch.randint(50_000, (tokens,))).flatten(), minlength=16).float()
    mean = tokens * 4 / 16
    assert (load_N - mean).abs().max() < 4 * math.sqrt(mean)
    skewed = torch.bincount(experts_of(router, torch.zeros(tokens, dtype=torch.int64)).flatten(), minlength=16)
    assert (skewed - mean).abs().max() > 100 * math.sqrt(mean)  # negative control: one id has its four experts


def test_pairs_of_experts_meet_evenly() -> None:
    """Every run has an order of its own: no two experts are always, or never, chosen together."""
    chosen_TK = experts_of(HashRouter(4, 8, 2), torch.arange(8 * 4000))
    together = torch.zeros(8, 8)
    together.index_put_((chosen_TK[:, 0], chosen_TK[:, 1]), torch.ones(len(chosen_TK)), accumulate=True)
    together = (together + together.T)[~torch.eye(8, dtype=torch.bool)]
    mean = 8 * 4000 * 2 / 56
    assert (together - mean).abs().max() < 5 * math.sqrt(mean)


def test_weights_are_even_and_sum_to_the_route_scale() -> None:
    router = HashRouter(4, 8, 4, options=RouterOptions(route_scale=4.0))
    routing = router(torch.randn(10, 4, dtype=torch.bfloat16), RouterInput(torch.arange(10)))
    assert (routing.weight_P == 1.0).all() and routing.weight_P.dtype == torch.float32
    assert routing.stats["variance_factor"].item() == 1 and routing.stats["load"].sum() == 40
