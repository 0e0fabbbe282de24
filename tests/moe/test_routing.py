"""Routing: the statistics of who went where, with padding left out."""

from __future__ import annotations

import pytest
import torch

from mue.moe import (
    Routing,
    gate_moments,
    routing_stats,
)


def test_variance_factor_of_uniform_and_one_hot_weights() -> None:
    """F = 1 and F = a; between them for anything else."""
    tokens, active, number = 50, 4, 8
    expert_TK = torch.rand(tokens, number).argsort(1)[:, :active]
    uniform = Routing.from_topk(expert_TK, torch.full((tokens, active), 1.0), number, route_scale=4.0)
    one_hot = Routing.from_topk(expert_TK, torch.tensor([4.0, 0, 0, 0]).expand(tokens, active), number, route_scale=4.0)
    skewed = Routing.from_topk(expert_TK, torch.tensor([2.0, 1, 0.5, 0.5]).expand(tokens, active), number)
    assert uniform.stats["variance_factor"].item() == pytest.approx(1)
    assert one_hot.stats["variance_factor"].item() == pytest.approx(active)
    assert 1.1 < skewed.stats["variance_factor"].item() < active - 0.1
    assert gate_moments(uniform) == pytest.approx((1.0, 1 / active))
    assert gate_moments(one_hot) == pytest.approx((1.0, 1.0))
    m1, m2 = gate_moments(skewed)  # F = a m2 / m1^2 where the sum is the same for every token
    assert skewed.stats["variance_factor"].item() == pytest.approx(active * m2 / m1**2)


def test_stats_leave_padding_out() -> None:
    expert_TK = torch.tensor([[0, 1, 3], [1, 3, 3]])  # 3 is padding
    routing = Routing.from_topk(expert_TK, torch.tensor([[0.5, 0.5, 0], [1.0, 0, 0]]), 3)
    assert routing.stats["load"].tolist() == [1, 2, 0]
    assert routing.stats["load_max"].item() == pytest.approx(2 / 3) and routing.stats["load_min"].item() == 0
    assert routing.stats["gate_sum"].item() == 1
    assert routing.stats["variance_factor"].item() == pytest.approx(1.5 * 0.75)
    flat = Routing(routing.token_P, routing.expert_P, routing.weight_P, 2, 3, slots=0)
    for name, value in routing_stats(flat).items():
        torch.testing.assert_close(value, routing.stats[name])
