"""mue.moe.routers.group_limited (2405.04434, 2412.19437)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mue
from mue.moe import Router, gate_moments
from mue.moe.routers.base import RouterOptions
from mue.moe.routers.group_limited import GroupLimitedRouter
from mue.shapes.block import MEASURED


def made(experts: int = 16, active: int = 4, **given: object) -> GroupLimitedRouter:
    options = RouterOptions(route_scale=float(active), settings=given)
    score = str(given.get("score", "sigmoid"))
    router = GroupLimitedRouter(6, experts, active, options=options, score=score)  # type: ignore[arg-type]
    torch.nn.init.normal_(router.weight)
    return router


def experts_TK(router: GroupLimitedRouter | Router, x_TD: Tensor) -> Tensor:
    return router(x_TD).expert_P.view(len(x_TD), -1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 6),
    size=st.integers(1, 5),
    kept=st.integers(1, 6),
    active=st.integers(1, 8),
    group_score=st.sampled_from(["max", "top2"]),
    score=st.sampled_from(["sigmoid", "softmax"]),
)
def test_against_a_plain_loop(
    seed: int, groups: int, size: int, kept: int, active: int, group_score: str, score: str
) -> None:
    """The kept groups by the best, or by the two best together, biased; the a best of theirs; weights without the bias, in float64."""
    torch.manual_seed(seed)
    kept = min(kept, groups)
    active = min(active, kept * size)
    if active == 1:  # whose weight is 1 whatever it is, of which a warning tells
        return
    router = made(groups * size, active, n_group=groups, topk_group=kept, group_score=group_score, score=score).double()
    router.balance_bias.normal_(std=0.5)
    x_TD = torch.randn(8, 6, dtype=torch.float64)
    logit_TN = x_TD @ router.weight.T
    score_TN = logit_TN.sigmoid() if score == "sigmoid" else logit_TN.softmax(1)
    routing = router(x_TD)
    for token in range(8):
        row, own = (score_TN[token] + router.balance_bias).tolist(), score_TN[token].tolist()
        best = {"max": 1, "top2": 2}[group_score]
        ranks = [sum(sorted(row[g * size : (g + 1) * size], reverse=True)[:best]) for g in range(groups)]
        chosen = sorted(range(groups), key=lambda g: -ranks[g])[:kept]
        inside = [e for g in chosen for e in range(g * size, (g + 1) * size)]
        expected = sorted(inside, key=lambda e: -row[e])[:active]
        assert routing.expert_P.view(8, -1)[token].tolist() == expected
        total = math.fsum(own[e] for e in expected)
        assert routing.weight_P.view(8, -1)[token].tolist() == pytest.approx(
            [active * own[e] / total for e in expected]
        )


def test_no_token_leaves_its_groups_and_plain_top_k_does() -> None:
    """At most `topk_group` groups a token; the same router without limit uses more (the control), and with all groups kept is it."""
    torch.manual_seed(0)
    x_TD, limited = torch.randn(300, 6), made(n_group=8, topk_group=2)
    plain = Router(6, 16, 4, route_scale=4.0)
    plain.load_state_dict(limited.state_dict())
    groups = [max(len({e // 2 for e in row}) for row in experts_TK(r, x_TD).tolist()) for r in (limited, plain)]
    assert groups == [2, 4]
    free = made(n_group=8, topk_group=8)
    free.load_state_dict(limited.state_dict())
    a, b = free(x_TD), plain(x_TD)
    assert torch.equal(a.expert_P, b.expert_P) and torch.equal(a.weight_P, b.weight_P)


def test_the_two_group_scores_differ() -> None:
    """A group of one high and one low score wins by its best and loses by its two best."""
    found = []
    for group_score in ("max", "top2"):
        router = made(4, 2, n_group=2, topk_group=1, group_score=group_score)
        router.weight.data = torch.tensor([[3.0, -9.0, 2.0, 2.0]]).T.repeat(1, 6) / 6
        found.append(sorted(experts_TK(router, torch.ones(1, 6))[0].tolist()))
    assert found == [[0, 1], [2, 3]]


def test_a_negative_bias_keeps_groups_out_of_reach() -> None:
    """Masked with 0 in place of -inf, the experts of dropped groups would beat kept ones whose biased scores are negative."""
    router = made(8, 4, n_group=4, topk_group=2)
    router.balance_bias.fill_(-5.0)
    assert all(len({e // 2 for e in row}) == 2 for row in experts_TK(router, torch.randn(50, 6)).tolist())


def test_the_bias_has_no_part_in_weights_or_gradients_and_is_restored() -> None:
    """With all experts active the selection is the same: weights and the matrix's gradient are, whatever the bias."""
    torch.manual_seed(1)
    x_TD, value_TN, found = torch.randn(20, 6), torch.randn(20, 8), []
    router = made(8, 8, n_group=4, topk_group=4)
    for bias in (0.0, 0.7):
        router.balance_bias.copy_(torch.linspace(-bias, bias, 8))
        routing = router(x_TD)
        weight_TN = torch.zeros(20, 8).scatter(1, routing.expert_P.view(20, 8), routing.weight_P.view(20, 8))
        found.append((weight_TN, *torch.autograd.grad((weight_TN * value_TN).sum(), router.weight)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    again = made(8, 8, n_group=4, topk_group=4)
    again.load_state_dict(router.state_dict())
    assert torch.equal(again.balance_bias, router.balance_bias) and router.balance_bias.any()


def test_the_bias_balances_without_a_loss() -> None:
    """MaxVio = max load / mean load - 1 falls below 0.3; without the bias it stays (the control)."""
    torch.manual_seed(2)
    router, frozen = made(), made()
    frozen.load_state_dict(router.state_dict())
    router.weight.data *= 0.3
    frozen.weight.data *= 0.3
    lean = torch.randn(6)
    for step in range(200):
        routing = router(lean + torch.randn(256, 6))
        router.end_step_(0.01 if step < 150 else 0.002)
    load_N = router(lean + torch.randn(4096, 6)).stats["load"].float()
    skewed_N = frozen(lean + torch.randn(4096, 6)).stats["load"].float()
    assert load_N.max() / load_N.mean() - 1 < 0.3 < skewed_N.max() / skewed_N.mean() - 1
    assert not routing.losses


def test_gates_are_unit_sum_or_measured_and_other_numbers_of_experts_fit() -> None:
    torch.manual_seed(3)
    x_TD, router = torch.randn(400, 6), made()
    m1, m2 = gate_moments(router(x_TD))
    assert m1 == pytest.approx(1.0) and m2 == pytest.approx(1 / 4, rel=0.25)
    raw = GroupLimitedRouter(6, 16, 4, score="softmax", normalize=False, gates=MEASURED)
    assert gate_moments(raw(x_TD))[0] == pytest.approx(4 / 16, rel=0.1)
    router.eval().set_active(8)
    assert router(x_TD).slots == 8
    with pytest.raises(ValueError, match=r"9 active experts do not fit into topk_group = 4 groups of 2 each"):
        router.set_active(9)


def test_refusals_name_the_numbers() -> None:
    common = {"width": 32, "expert": 16, "layers": 1, "head_dim": 16, "router": "group-limited"}
    for notation, given_, message in (
        ("12e2a", {}, "n_group = 8 of the group-limited router does not divide the 12 experts"),
        ("16e2a", {"topk_group": 9}, "topk_group = 9 of the group-limited router is more than n_group = 8"),
        ("16e4a", {"topk_group": 1}, "4 active experts do not fit into topk_group = 1 groups of 2"),
        ("16e2a", {"group_score": "top3"}, "did you mean 'top2'"),
        ("16e2a2g", {}, "knows no groups"),
    ):
        with pytest.raises(ValueError, match=message):
            mue.MoE.parse(notation, router_settings=given_, **common)
