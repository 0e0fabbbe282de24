"""The top-k router: scores, groups, ties, the balance bias, what it refuses."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mue.moe import Router, Routing, balance_bias_step, gate_moments
from mue.moe.routers.base import RouterOptions, build
from mue.shapes import Block
from support.precision import close


def weights_TK(routing: Routing) -> Tensor:
    return routing.weight_P.view(routing.num_tokens, routing.slots)


def experts_TK(routing: Routing) -> Tensor:
    return routing.expert_P.view(routing.num_tokens, routing.slots)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    extra=st.integers(0, 5),
    tokens=st.integers(0, 20),
    score=st.sampled_from(["sigmoid", "softmax"]),
    scale=st.sampled_from([0.1, 1.0, 50.0]),
)
def test_weights_sum_to_the_route_scale_and_groups_are_exact(
    seed: int, groups: int, per_group: int, extra: int, tokens: int, score: str, scale: float
) -> None:
    torch.manual_seed(seed)
    active, number = groups * per_group, groups * (per_group + extra)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        router = Router(5, number, active, groups, score=score, route_scale=float(active))  # type: ignore[arg-type]
    torch.nn.init.normal_(router.weight, std=scale)
    routing = router(torch.randn(tokens, 5))
    assert routing.num_pairs == tokens * active and routing.weight_P.dtype == torch.float32
    torch.testing.assert_close(weights_TK(routing).sum(1), torch.full((tokens,), float(active)))
    chosen = experts_TK(routing)
    assert all(len(set(row)) == active for row in chosen.tolist())
    group_TK = chosen // (number // groups)
    for group in range(groups):
        assert ((group_TK == group).sum(1) == per_group).all()


def test_without_groups_the_counts_are_not_exact() -> None:
    """Negative control of the group test."""
    torch.manual_seed(0)
    group_TK = experts_TK(Router(5, 8, 4)(torch.randn(50, 5))) // 4
    assert not ((group_TK == 0).sum(1) == 2).all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_weights_are_the_scores_normalised_globally(score: str) -> None:
    """Over all active experts; normalising inside each group gives other numbers (the negative control)."""
    torch.manual_seed(1)
    router = Router(6, 8, 4, 2, score=score, route_scale=4.0)  # type: ignore[arg-type]
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(30, 6)
    routing = router(x_TD)
    logit_TN = x_TD @ router.weight.T
    score_TN = logit_TN.sigmoid() if score == "sigmoid" else logit_TN.softmax(1)
    picked_TK = score_TN.gather(1, experts_TK(routing))
    torch.testing.assert_close(weights_TK(routing), 4 * picked_TK / picked_TK.sum(1, keepdim=True))
    picked_TGK = picked_TK.view(30, 2, 2)
    per_group = (2 * picked_TGK / picked_TGK.sum(2, keepdim=True)).reshape(30, 4)  # also sums to 4
    assert (weights_TK(routing) - per_group).abs().max() > 0.05


def test_selection_is_the_best_of_score_plus_bias() -> None:
    torch.manual_seed(2)
    router = Router(6, 10, 3)
    torch.nn.init.normal_(router.weight)
    router.balance_bias.normal_(std=0.3)
    x_TD = torch.randn(40, 6)
    biased_TN = (x_TD @ router.weight.T).sigmoid() + router.balance_bias
    best = biased_TN.topk(3, dim=1).indices
    assert torch.equal(experts_TK(router(x_TD)), best)
    router.balance_bias.zero_()
    assert not torch.equal(experts_TK(router(x_TD)), best)  # negative control


def test_refusals_name_the_numbers_and_the_fix() -> None:
    for arguments, message in (
        ((8, 4, 5), r"active=5 exceeds experts=4"),
        ((8, 9, 4, 2), r"groups=2 does not divide experts=9"),
        ((8, 9, 4, 3), r"groups=3 does not divide active=4"),
        ((8, 0, 0), r"at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Router(*arguments)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="route_scale"):
            Router(8, 4, 2, route_scale=scale)
    with pytest.raises(ValueError, match='"sigmoid" or "softmax"'):
        Router(8, 4, 2, score="tanh")  # type: ignore[arg-type]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_gates_that_do_not_sum_to_one_must_be_measured(score: str) -> None:
    with pytest.raises(ValueError, match='gates="measured"'):
        Router(8, 4, 2, score=score, normalize=False)  # type: ignore[arg-type]
    router = Router(8, 4, 2, score=score, normalize=False, gates="measured", route_scale=3.0)  # type: ignore[arg-type]
    m1, _ = gate_moments(router(torch.randn(500, 8)))
    assert abs(m1 - (1.0 if score == "sigmoid" else 0.5)) < 0.1  # a sigmoids of 1/2, or a/N of the softmax


def test_one_active_normalised_gate_warns_and_has_no_gradient() -> None:
    with pytest.warns(UserWarning, match="no gradient"):
        router = Router(8, 4, 1)
    x_TD = torch.randn(5, 8)
    (gradient,) = torch.autograd.grad((router(x_TD).weight_P * torch.randn(5)).sum(), router.weight)
    assert gradient.abs().max() == 0
    with warnings.catch_warnings():  # two active, measured gates, or nothing to choose: no warning
        warnings.simplefilter("error")
        two = Router(8, 4, 2)
        Router(8, 4, 1, normalize=False, gates="measured")
        Router(8, 1, 1)
    (gradient,) = torch.autograd.grad((two(x_TD).weight_P * torch.randn(10)).sum(), two.weight)
    assert gradient.abs().max() > 0


def test_bias_balances_a_skewed_input() -> None:
    torch.manual_seed(3)
    router = Router(16, 8, 2)
    torch.nn.init.normal_(router.weight, std=0.3)
    centre = torch.randn(16)  # every token leans the same way, so the same experts win
    spread = []
    for _ in range(300):
        routing = router(centre + 0.5 * torch.randn(256, 16))
        spread.append(float(routing.stats["load_max"] - routing.stats["load_min"]))
        router.update_bias_(0.01)
    assert spread[0] > 0.3 and sum(spread[-20:]) / 20 < 0.1
    frozen = Router(16, 8, 2)  # negative control: without updates it stays skewed
    frozen.load_state_dict({**router.state_dict(), "balance_bias": torch.zeros(8)})
    late = frozen(centre + 0.5 * torch.randn(256, 16)).stats
    assert float(late["load_max"] - late["load_min"]) > 0.3


def test_bias_changes_the_selection_only() -> None:
    """The same expert set gives the same weights, whatever the bias; and no gradient reaches the bias."""
    torch.manual_seed(4)
    router = Router(6, 4, 4)  # all active: every bias selects the same set
    x_TD = torch.randn(20, 6)
    plain = router(x_TD)
    router.balance_bias.copy_(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    biased = router(x_TD)
    by_expert = [torch.zeros(20, 4).scatter(1, experts_TK(r), weights_TK(r)) for r in (plain, biased)]
    torch.testing.assert_close(*by_expert)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    torch.nn.init.normal_(router.weight)  # negative control: a real change of the scores is seen
    changed = router(x_TD)
    assert (torch.zeros(20, 4).scatter(1, experts_TK(changed), weights_TK(changed)) - by_expert[0]).abs().max() > 0.01


def test_bias_step_is_the_sign_against_the_mean() -> None:
    assert balance_bias_step(torch.tensor([5, 1, 3]), 0.5).tolist() == [-0.5, 0.5, 0.0]
    router = Router(4, 3, 2)
    router.eval()
    router(torch.randn(10, 4))
    assert router.load.sum() == 0  # evaluation leaves no trace
    router.train()
    router(torch.randn(10, 4))
    router(torch.randn(7, 4))
    assert router.load.sum() == 34
    router.update_bias_(1e-3)
    assert router.load.sum() == 0 and router.balance_bias.abs().max() == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("score", "experts", "step"), [("sigmoid", 64, 0.01), ("softmax", 64, 0.01 / 32), ("softmax", 4, 0.005)]
)
def test_a_step_of_the_bias_is_in_proportion_to_the_score(score: str, experts: int, step: float) -> None:
    """A fiftieth of what scores are at zero logits: ½, or 1/N."""
    router = Router(4, experts, 2, score=score)  # type: ignore[arg-type]
    router(torch.randn(40, 4))
    router.end_step_(0.01)
    assert router.balance_bias.abs().max() == pytest.approx(step)


def test_routing_is_float32_under_autocast_and_for_bf16_input() -> None:
    torch.manual_seed(5)
    router = Router(64, 16, 4, balance="loss", z_loss=True)
    x_TD = torch.randn(100, 64).bfloat16()
    plain = router(x_TD.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x_TD)
    assert routing.weight_P.dtype == torch.float32
    assert torch.equal(routing.expert_P, plain.expert_P)
    assert close(routing.weight_P, plain.weight_P, operations=64 + 4)  # a product over the width, a sum over the active
    assert routing.losses["router_z"].dtype == torch.float32
    rounded = (x_TD @ router.weight.T.bfloat16()).float()  # negative control: bf16 logits are other numbers
    assert not close(rounded, x_TD.float() @ router.weight.T, operations=64 + 4)


def test_extreme_logits_give_finite_weights_and_gradients() -> None:
    router = Router(2, 4, 2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[-300.0, 0], [-301.0, 0], [-400.0, 0], [-500.0, 0]]))
    x_TD = torch.tensor([[1.0, 0.0]])
    assert (x_TD @ router.weight.T).sigmoid().sum() == 0  # dividing the scores would be 0/0
    routing = router(x_TD)
    torch.testing.assert_close(routing.weight_P, torch.tensor([-300.0, -301.0]).softmax(0))
    (gradient,) = torch.autograd.grad(routing.weight_P[0], router.weight)
    assert gradient.isfinite().all()


def test_state_dict_resumes_the_balance() -> None:
    router = Router(4, 3, 2)
    router(torch.randn(11, 4))
    router.balance_bias += 0.5
    again = Router(4, 3, 2)
    again.load_state_dict(router.state_dict())
    assert torch.equal(again.load, router.load) and torch.equal(again.balance_bias, router.balance_bias)


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_what_a_model_says_to_its_routers_reaches_the_standard_ones(name: str) -> None:
    options = RouterOptions(route_scale=2.0, balance="loss", z_loss=True, seed=3, layer=5, pool=1)
    router = build(Block(layers=1, experts=4, active=2, expert=8, router=name), 8, options)
    said = {f.name: getattr(router.options, f.name) for f in fields(options) if f.name != "settings"}
    assert said == {f.name: getattr(options, f.name) for f in fields(options) if f.name != "settings"}
    with pytest.raises(TypeError, match="rout_scale"):
        Router(8, 4, 2, rout_scale=2.0)
