"""mue.moe.routers.expert_choice: equal loads, what leaks and what does not, thresholds, against a loop in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mue
from mue.lab.models.language import LanguageModel
from mue.moe import MoELayer, Routing, gate_moments
from mue.moe.routers.base import RouterOptions
from mue.moe.routers.expert_choice import ExpertChoiceRouter, moments


def made(experts: int = 8, active: int = 2, width: int = 6, R: float = 1.0, **chosen: object) -> ExpertChoiceRouter:
    router = ExpertChoiceRouter(width, experts, active, options=RouterOptions(route_scale=R, settings=chosen))
    torch.nn.init.normal_(router.weight, std=width**-0.5)
    return router


def dense(routing: Routing) -> Tensor:
    """(T, N) weights, 0 where a pair is not there."""
    out = routing.weight_P.new_zeros(routing.num_tokens, routing.num_experts)
    return out.index_put((routing.token_P, routing.expert_P), routing.weight_P)


def parts(router: ExpertChoiceRouter, x_TD: Tensor) -> Tensor:
    return (x_TD.double() @ router.weight.double().T).softmax(1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), experts=st.integers(1, 9), tokens=st.integers(9, 40), data=st.data())
def test_every_expert_takes_its_share_of_those_that_like_it_most(
    seed: int, experts: int, tokens: int, data: st.DataObject
) -> None:
    active = data.draw(st.integers(1, experts))
    torch.manual_seed(seed)
    router, x_TD = made(experts, active, R=3.0), torch.randn(6) + torch.randn(tokens, 6)
    routing, score_TN = router(x_TD), parts(router, x_TD).detach()
    share = round(tokens * active / experts)
    expected = torch.zeros_like(score_TN)
    for e, own in enumerate(score_TN.T.tolist()):
        for t in sorted(range(tokens), key=lambda t: -own[t])[:share]:
            expected[t, e] = 3.0 * own[t]
    torch.testing.assert_close(dense(routing).double(), expected, rtol=1e-5, atol=1e-6)
    assert routing.stats["load"].tolist() == [share] * experts and routing.num_pairs == experts * share


def test_control_tokens_that_choose_do_not_load_equally() -> None:
    torch.manual_seed(0)
    router, x_TD = made(), torch.randn(6) + torch.randn(64, 6)
    load = torch.bincount(parts(router, x_TD).topk(2, dim=1).indices.flatten(), minlength=8)
    assert load.max() > 2 * load.min() and len(set(router(x_TD).stats["load"].tolist())) == 1


def test_gradients_are_those_of_the_dense_formula() -> None:
    torch.manual_seed(1)
    router, x_TD, other_TN = made(R=2.0).double(), torch.randn(20, 6).double(), torch.randn(20, 8).double()
    routing = router(x_TD)
    (ours,) = torch.autograd.grad((dense(routing) * other_TN).sum(), router.weight)
    chosen_TN = dense(routing).detach() > 0
    score_TN = (x_TD @ router.weight.T).softmax(1)
    (exact,) = torch.autograd.grad((2.0 * score_TN * chosen_TN * other_TN).sum(), router.weight)
    torch.testing.assert_close(ours, exact)
    assert exact.abs().max() > 1e-3


def test_the_threshold_is_an_average_of_the_last_score_taken() -> None:
    """In float64, by hand; a pass seen twice is the same, and so are evaluation and steps without a pass."""
    torch.manual_seed(2)
    router = made(memory=0.5).double()
    expected = torch.zeros(8, dtype=torch.float64)
    for step in range(6):
        x_TD = torch.randn(40, 6).double()
        for _ in range(2):  # once more, as a recomputed block does
            router(x_TD)
        router.eval()(torch.randn(40, 6).double())
        router.train().end_step_(0.0)
        last_N = parts(router, x_TD).sort(0, descending=True).values[10 - 1]
        rate = max(0.5, 1 / (step + 1))
        expected = (1 - rate) * expected + rate * last_N
        torch.testing.assert_close(router.threshold, expected)
    router.end_step_(0.0)
    torch.testing.assert_close(router.threshold, expected)
    again = made(memory=0.5).double()
    again.load_state_dict(router.state_dict())
    x_TD = torch.randn(40, 6).double()
    for each in (router, again):
        each(x_TD)
        each.end_step_(0.0)
    assert torch.equal(router.threshold, again.threshold) and not torch.equal(router.threshold, expected)


def test_by_threshold_a_token_has_as_many_experts_on_average() -> None:
    torch.manual_seed(3)
    router, centre = made(16, 4), torch.randn(6)
    for _ in range(30):
        router(centre + torch.randn(512, 6))
        router.end_step_(0.0)
    routing = router.eval()(centre + torch.randn(4096, 6))
    assert routing.num_pairs / 4096 == pytest.approx(4, rel=0.05)
    load_N = routing.stats["load"] / (4096 * 4 / 16)
    assert (load_N - 1).abs().max() < 0.2
    router.threshold += 0.02  # control
    assert router(centre + torch.randn(4096, 6)).num_pairs / 4096 < 3.8


def test_before_the_first_step_each_token_has_its_best() -> None:
    router, x_TD = made().eval(), torch.randn(30, 6)
    found_TN = dense(router(x_TD)) > 0
    assert torch.equal(found_TN, torch.zeros(30, 8).scatter(1, parts(router, x_TD).topk(2, 1).indices, 1.0) > 0)


def test_a_token_that_no_expert_takes_and_a_batch_of_them() -> None:
    router = made()
    router(torch.randn(40, 6))
    router.end_step_(0.0)
    router.threshold.fill_(2.0)
    layer = MoELayer(6, router.eval(), 4)
    y_TD, routing = layer(torch.randn(5, 6))
    assert routing.num_pairs == 0 and (y_TD == 0).all() and routing.stats["load"].sum() == 0


@pytest.mark.parametrize("way", ["training", "batch", "threshold"])
def test_a_later_token_changes_earlier_ones_unless_chosen_by_threshold(way: str) -> None:
    """Of a whole model: the logits of every token up to t, when the token t + 1 is another one."""
    torch.manual_seed(4)
    chosen = {"evaluation": "batch"} if way == "batch" else {}
    shape = mue.MoE.parse(
        "8e2a", width=32, expert=16, layers=2, head_dim=16, sequence=16, router="expert-choice", router_settings=chosen
    )
    model, tokens, changed = LanguageModel(shape), torch.randint(256, (1, 16)), 0.0
    for _ in range(3):
        model(torch.randint(256, (8, 16)))
        model.end_step_(0.0)
    model.train(way == "training")
    for t in range(15):
        other = tokens.clone()
        other[0, t + 1] = (other[0, t + 1] + 1) % 256
        with torch.no_grad():
            before, after = model(tokens).logits[0], model(other).logits[0]
        changed = max(changed, float((before - after)[: t + 1].abs().max()))
        assert (before - after)[t + 1 :].abs().max() > 1e-4
    assert changed == 0.0 if way == "threshold" else changed > 1e-4


@pytest.mark.parametrize("std", [0.0, 0.3, 0.6])
@pytest.mark.parametrize(("experts", "active", "bounds"), [(8, 2, (0.06, 0.21)), (128, 8, (0.02, 0.03))])
def test_moments_are_those_of_gaussian_logits(
    experts: int, active: int, bounds: tuple[float, float], std: float
) -> None:
    """Against a router's own routing of 20,000 Gaussian tokens: what the formula leaves out falls with N."""
    torch.manual_seed(5)
    router = made(experts, active, width=experts).double()
    with torch.no_grad():
        router.weight.copy_(std * torch.eye(experts))  # logits are std · x
    found = gate_moments(router(torch.randn(20_000, experts).double()))
    for ours, measured, bound in zip(moments(active, experts, {"logit_std": std}), found, bounds, strict=True):
        assert ours == pytest.approx(measured, rel=bound)
    if std > 0:  # control: what even logits would have is far off
        assert found[0] > 1.3 * active / experts


def test_refusals_name_the_numbers_and_the_fix() -> None:
    with pytest.raises(ValueError, match=r"each of 8 experts 3·2/8 = 0\.75 of 3 tokens: give it at least 4 tokens"):
        made()(torch.randn(3, 6))
    assert made()(torch.randn(0, 6)).num_pairs == 0 and made().eval()(torch.randn(1, 6)).num_pairs == 2
    for wrong in ({"memory": 1.0}, {"memory": -0.1}, {"evaluation": "treshold"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            made(**wrong)
    with pytest.raises(ValueError, match="knows no groups"):
        ExpertChoiceRouter(6, 8, 2, 2)
    assert made()(torch.full((8, 6), 1e4)).weight_P.isfinite().all()
