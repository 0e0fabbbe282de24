"""The auxiliary losses of a router."""

from __future__ import annotations

import math

import pytest
import torch

from mue.moe import (
    load_balance_loss,
    router_z_loss,
)


def test_balance_loss_is_one_when_balanced_and_n_when_collapsed() -> None:
    uniform = torch.full((6, 4), 0.25)
    assert load_balance_loss(uniform, torch.tensor([3, 3, 3, 3])).item() == pytest.approx(1)
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).expand(6, 4)
    assert load_balance_loss(collapsed, torch.tensor([12, 0, 0, 0])).item() == pytest.approx(4)


def test_balance_loss_pushes_the_crowded_expert_down() -> None:
    logit_TN = torch.zeros(6, 4, requires_grad=True)
    loss = load_balance_loss(logit_TN.softmax(1), torch.tensor([9, 1, 1, 1]))
    (gradient,) = torch.autograd.grad(loss, logit_TN)
    assert (gradient[:, 0] > 0).all() and (gradient[:, 1:] < 0).all()


def test_z_loss_is_mean_square_of_logsumexp() -> None:
    logit_TN = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert router_z_loss(logit_TN).item() == pytest.approx(expected)
    assert router_z_loss(logit_TN + 1).item() > expected + 0.1  # softmax would not see this shift
