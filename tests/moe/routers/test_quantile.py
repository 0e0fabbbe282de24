"""mue.moe.routers.quantile: thresholds that are quantiles, balance within a few steps, against sorting in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mue.moe import Router
from mue.moe.routers.base import RouterOptions
from mue.moe.routers.quantile import QuantileRouter


def made(experts: int = 8, active: int = 2, groups: int = 1, width: int = 6, **chosen: object) -> QuantileRouter:
    router = QuantileRouter(width, experts, active, groups, RouterOptions(route_scale=active, settings=chosen))
    torch.nn.init.normal_(router.weight, std=width**-0.5)
    return router


def sorted_quantile(logit_TN: Tensor, threshold_N: Tensor, active: int, groups: int) -> Tensor:
    """The next thresholds, by sorting all scores of each token and then of each expert; float64."""
    tokens, experts = logit_TN.shape
    size, each = experts // groups, active // groups
    over = torch.empty_like(logit_TN)
    for t in range(tokens):
        for g in range(groups):
            own = slice(g * size, (g + 1) * size)
            rank = sorted((logit_TN[t, own] - threshold_N[own]).tolist(), reverse=True)
            over[t, own] = logit_TN[t, own] - rank[each]
    share = max(1, round(tokens * active / experts))
    next_N = torch.tensor([sorted(over[:, e].tolist(), reverse=True)[share - 1] for e in range(experts)]).double()
    return next_N - next_N.view(groups, size).mean(1).repeat_interleave(size)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31), groups=st.integers(1, 3), each=st.integers(1, 2), more=st.integers(1, 3),
    tokens=st.integers(8, 30),
)  # fmt: skip
def test_thresholds_are_the_sorted_quantiles(seed: int, groups: int, each: int, more: int, tokens: int) -> None:
    """Over three steps, so that thresholds that are not zero are among what is compared."""
    torch.manual_seed(seed)
    active, experts = groups * each, groups * (each + more)
    router = made(experts, active, groups).double()
    expected = torch.zeros(experts, dtype=torch.float64)
    for _ in range(3):
        x_TD = torch.randn(6).double() + torch.randn(tokens, 6).double()
        logit_TN = x_TD @ router.weight.T
        routing = router(x_TD)
        chosen_TK = routing.expert_P.view(tokens, active)
        size = experts // groups
        best = (logit_TN - expected).view(tokens, groups, size).topk(each, dim=2).indices.sort(2).values
        best = (best + torch.arange(0, experts, size)[:, None]).view(tokens, active)
        assert torch.equal(chosen_TK.view(tokens, groups, each).sort(2).values.view(tokens, active), best)
        expected = sorted_quantile(logit_TN.detach(), expected, active, groups)
        router.end_step_(0.0)
        torch.testing.assert_close(router.threshold, expected, rtol=0, atol=1e-6)  # what is equal in float32 is a tie


def test_at_its_threshold_each_expert_would_have_had_its_share() -> None:
    """What defines it: the tokens whose scores pass both α and β are T·a/N of each expert's. (Those that are the (a+1)-th choice of a
    token are exactly at α, so that several may be exactly at β as well.)"""
    torch.manual_seed(0)
    router, x_TD = made().double(), torch.randn(6).double() + torch.randn(200, 6).double()
    logit_TN = (x_TD @ router.weight.T).detach()
    over_TN = logit_TN - logit_TN.topk(3, dim=1).values[:, 2:]
    router(x_TD)
    router.end_step_(0.0)
    beta_N = over_TN.sort(0, descending=True).values[49]
    torch.testing.assert_close(router.threshold, beta_N - beta_N.mean())
    assert ((over_TN > beta_N).sum(0) < 50).all() and ((over_TN >= beta_N).sum(0) >= 50).all()
    assert not ((over_TN > 0).sum(0) < 50).all()  # control


def test_it_balances_a_skewed_input_in_a_few_steps() -> None:
    """Five of them, where the bias walk of 2408.15664 at its published speed has hardly begun; without thresholds it stays skewed."""
    torch.manual_seed(1)
    router, walk, centre = made(16, 4, width=16), Router(16, 16, 4), torch.randn(16)
    torch.nn.init.normal_(router.weight, std=0.3)
    walk.load_state_dict({**walk.state_dict(), "weight": router.weight.detach()})
    excess: dict[str, list[float]] = {"quantile": [], "walk": []}
    for _ in range(10):
        x_TD = centre + 0.5 * torch.randn(1024, 16)
        for name, each in (("quantile", router), ("walk", walk)):
            excess[name].append(float(each(x_TD).stats["load_max"] * 16 - 1))
            each.end_step_(1e-3)
    assert excess["quantile"][0] > 1.5 and max(excess["quantile"][5:]) < 0.3
    assert min(excess["walk"][5:]) > 1.5
    router.threshold.zero_()  # control
    assert float(router(centre + 0.5 * torch.randn(1024, 16)).stats["load_max"] * 16 - 1) > 1.5


def test_thresholds_choose_and_do_not_weigh() -> None:
    torch.manual_seed(2)
    router, x_TD = made(4, 4), torch.randn(20, 6)  # all active: every threshold chooses the same
    plain = router(x_TD)
    router.threshold.copy_(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    moved = router(x_TD)
    by_expert = [torch.zeros(20, 4).scatter(1, r.expert_P.view(20, 4), r.weight_P.view(20, 4)) for r in (plain, moved)]
    torch.testing.assert_close(*by_expert)
    assert router.passes == 0  # nothing to balance
    picked = (x_TD @ router.weight.T).sigmoid()
    torch.testing.assert_close(by_expert[0], 4 * picked / picked.sum(1, keepdim=True))
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_no_later_token_is_read_in_training_either() -> None:
    torch.manual_seed(3)
    router, x_TD = made(), torch.randn(40, 6)
    router(torch.randn(40, 6))
    router.end_step_(0.0)
    before = router(x_TD).expert_P[: 30 * 2]
    after = router(torch.cat([x_TD[:30], 5 * torch.randn(10, 6)])).expert_P[: 30 * 2]
    assert torch.equal(before, after)
    router.end_step_(0.0)
    assert not torch.equal(router(x_TD).expert_P[: 30 * 2], before)  # control: the next step's thresholds are others


def test_passes_of_one_step_count_alike_and_memory_averages() -> None:
    torch.manual_seed(4)
    batches = [torch.randn(40, 6) for _ in range(2)]
    alone = []
    for x_TD in batches:
        router = made()
        router.weight.data.copy_(torch.linspace(-1, 1, 48).view(8, 6))
        router(x_TD)
        router.end_step_(0.0)
        alone.append(router.threshold)
    both, slow = made(), made(memory=0.5)
    for each in (both, slow):
        each.weight.data.copy_(torch.linspace(-1, 1, 48).view(8, 6))
    for x_TD in (*batches, *batches):  # each seen twice, as under activation checkpointing
        both(x_TD)
    both.end_step_(0.0)
    torch.testing.assert_close(both.threshold, (alone[0] + alone[1]) / 2)
    slow(batches[0])
    slow.end_step_(0.0)
    first = slow.threshold.clone()
    torch.testing.assert_close(first, alone[0])  # the first counts in full
    slow(batches[1])
    step = slow.seen.clone()
    slow.end_step_(0.0)
    torch.testing.assert_close(slow.threshold, (first + step) / 2)
    assert slow.steps == 2
    slow.eval()(batches[0])
    slow.end_step_(0.0)
    assert slow.steps == 2 and slow.passes == 0  # evaluation leaves no trace


def test_evaluated_with_more_experts_the_weights_keep_their_sum() -> None:
    router, x_TD = made(8, 2).eval(), torch.randn(20, 6)
    router.threshold.normal_()
    few = router(x_TD).expert_P.view(20, 2)
    router.set_active(5)
    routing = router(x_TD)
    assert torch.equal(routing.expert_P.view(20, 5)[:, :2], few)
    torch.testing.assert_close(routing.weight_P.view(20, 5).sum(1), torch.full((20,), 2.0))
    assert router.train()(x_TD).slots == 2


def test_what_it_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"memory of the quantile router must be a number of at least 0 and below 1, got 1"
    ):
        made(memory=1)
    assert made()(torch.randn(0, 6)).num_pairs == 0 and made()(torch.randn(1, 6)).num_pairs == 2
