"""mue.moe.losses.sharpness against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mue.moe import Routing, router_z_loss
from mue.moe.losses.sharpness import entropy, hierarchical, router_z


def routed(logit_TN: torch.Tensor) -> Routing:
    tokens, experts = logit_TN.shape
    routing = Routing.from_topk(torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1), experts)
    routing.logits_TN, routing.scores_TN = logit_TN, torch.softmax(logit_TN, 1)
    return routing


def test_z_loss_is_mean_square_of_logsumexp() -> None:
    logit_TN = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert router_z_loss(logit_TN).item() == router_z(routed(logit_TN)).item() == pytest.approx(expected)
    assert router_z_loss(logit_TN + 1).item() > expected + 0.1  # softmax would not see this shift


@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=4))
def test_entropy_and_divergence_by_their_sums(logits: list[list[float]]) -> None:
    expected = 0.0
    for row in logits:
        total = sum(map(math.exp, row))
        expected -= sum(math.exp(z) / total * math.log(math.exp(z) / total) for z in row) / len(logits)
    routing = routed(torch.tensor(logits, dtype=torch.float64))
    assert entropy(routing).item() == pytest.approx(expected, abs=1e-12)
    assert hierarchical(routing).item() == pytest.approx(expected - math.log(3), abs=1e-12)


def test_their_ends() -> None:
    even, certain = routed(torch.zeros(2, 8)), routed(torch.tensor([[200.0] + [0.0] * 7]))
    assert entropy(even).item() == pytest.approx(math.log(8)) and hierarchical(even).item() == pytest.approx(
        0, abs=1e-6
    )
    assert entropy(certain).item() == 0 and hierarchical(certain).item() == pytest.approx(-math.log(8))


def test_a_step_on_it_makes_a_router_more_certain() -> None:
    torch.manual_seed(0)
    logit_TN = torch.randn(20, 6, requires_grad=True)
    for loss in (entropy, hierarchical):
        (gradient,) = torch.autograd.grad(loss(routed(logit_TN)), logit_TN)
        before, after = (entropy(routed(z)).item() for z in (logit_TN, logit_TN - gradient))
        assert after < before < entropy(routed(logit_TN + gradient)).item()  # the control: uphill is less certain
    assert loss(routed(logit_TN + 1)).item() == pytest.approx(loss(routed(logit_TN)).item(), abs=1e-6)  # of ranks alone


def test_probabilities_that_underflow_have_finite_gradients() -> None:
    logit_TN = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    for loss in (entropy, hierarchical):
        (gradient,) = torch.autograd.grad(loss(routed(logit_TN)), logit_TN)
        assert gradient.isfinite().all()
    naive_TN = torch.softmax(logit_TN, 1)  # negative control: as the formula reads
    (gradient,) = torch.autograd.grad(-(naive_TN * naive_TN.log()).sum(), logit_TN)
    assert not gradient.isfinite().all()


def test_what_is_missing_is_named_and_no_tokens_cost_nothing() -> None:
    routing = routed(torch.zeros(2, 3))
    routing.logits_TN = None
    for loss in (router_z, hierarchical):
        with pytest.raises(
            ValueError, match=rf"the loss {loss.__name__} reads the router's logits.*set routing\.logits_TN"
        ):
            loss(routing)
    empty = routed(torch.zeros(0, 3))
    assert entropy(empty).item() == hierarchical(empty).item() == router_z(empty).item() == 0
