"""mue.moe.routers.top_p (2403.07652)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mue
from mue.moe import gate_moments
from mue.moe.routers.base import RouterOptions
from mue.moe.routers.top_p import TopPRouter
from mue.shapes.routers import LOGIT_STD


def made(experts: int = 16, active: int = 4, width: int = 6, std: float = 1.0, **given: object) -> TopPRouter:
    router = TopPRouter(width, experts, active, options=RouterOptions(route_scale=3.0, settings=given))
    torch.nn.init.normal_(router.weight, std=std)
    return router


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    experts=st.integers(1, 20),
    p=st.floats(0.01, 1.0),
    std=st.sampled_from([0.01, 0.5, 3.0]),
    renormalise=st.booleans(),
)
def test_against_a_plain_loop_in_float64(seed: int, experts: int, p: float, std: float, renormalise: bool) -> None:
    """Softmax, sorted, summed until p is there; raw weights, or divided by their sum."""
    torch.manual_seed(seed)
    router = made(experts, 1, std=std, p=p, renormalise=renormalise).double()
    x_TD = torch.randn(10, 6, dtype=torch.float64)
    routing = router(x_TD)
    assert routing.weight_P.dtype == torch.float64
    for token, row in enumerate((x_TD @ router.weight.T).tolist()):
        total = math.fsum(math.exp(z) for z in row)
        ranked = sorted(((math.exp(z) / total, e) for e, z in enumerate(row)), key=lambda pair: (-pair[0], pair[1]))
        count, mass = 0, 0.0
        while count < experts and (mass < p or p >= 1.0):
            mass += ranked[count][0]
            count += 1
        own = routing.weight_P.view(10, -1)[token], routing.expert_P.view(10, -1)[token]
        used = own[1] < experts
        if abs(mass - p) < 1e-6 or abs(mass - ranked[count - 1][0] - p) < 1e-6:
            continue  # which side rounding falls on is open
        assert int(used.sum()) == count and (own[0][~used] == 0).all()
        expected = {e: 3.0 * weight / (mass if renormalise else 1.0) for weight, e in ranked[:count]}
        found = dict(zip(own[1][used].tolist(), own[0][used].tolist(), strict=True))
        assert found == pytest.approx(expected)


def test_raw_weights_sum_to_p_or_a_little_more_and_renormalised_ones_to_one() -> None:
    torch.manual_seed(0)
    x_TD = torch.randn(300, 6)
    raw, whole = made(p=0.6), made(p=0.6, renormalise=True)
    whole.load_state_dict(raw.state_dict())
    sums_T = raw(x_TD).weight_P.view(300, -1).sum(1) / 3
    assert (sums_T >= 0.6 - 1e-6).all() and sums_T.max() > 0.7
    torch.testing.assert_close(whole(x_TD).weight_P.view(300, -1).sum(1), torch.full((300,), 3.0))


@pytest.mark.parametrize("p", [0.1, 0.4, 0.55, 1.0])
@pytest.mark.parametrize("renormalise", [False, True])
def test_moments_at_init(p: float, renormalise: bool) -> None:
    """Sampled for the logits' std, and measured on a router drawn so: to 3 % and 6 %. Of one std they are not the other's (the control)."""
    torch.manual_seed(1)
    x_TD, planned = torch.randn(2000, 64), []
    for std, bound in ((1e-3, 0.03), (1.0, 0.06)):
        router = made(16, 4, 64, std / 8, p=p, renormalise=renormalise)
        found = (*gate_moments(router(x_TD)), float(router(x_TD).stats["load"].sum()) / 2000)
        kind, own = router.kind, {**router.options.settings, LOGIT_STD: std}
        assert kind.moments is not None and kind.mean_active is not None and kind.sums_to_one(True, own) == renormalise
        planned.append((*kind.moments(4, 16, own), kind.mean_active(4, 16, own)))
        assert found == pytest.approx(planned[-1], rel=bound)
    even = kind.mean_active(4, 16, router.options.settings)
    assert even == math.ceil(p * 16 - 1e-9) == pytest.approx(planned[0][2], rel=0.01)
    assert p == 1.0 or abs(planned[1][1] / planned[0][1] - 1) > 0.2


def test_the_plan_is_exact_whatever_number_is_called_active() -> None:
    """A·R and the down projections' std depend on the moments: a = 2 and a = 7 of one router are one model at init."""
    base = mue.Dense(32, 32, 2, head_dim=16)
    plans = [
        mue.transfer(
            base,
            mue.MoE.parse(f"16e{a}a", width=64, expert=32, layers=2, head_dim=16, router="top-p"),
            mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.02),
        )
        for a in (2, 7)
    ]
    products = [plan.multipliers.output[0] * plan.multipliers.route[0] for plan in plans]
    assert products[0] == pytest.approx(products[1])
    stds = [plan.roles["expert_down"].values.init_std for plan in plans]
    assert stds[0] is not None and stds[1] is not None
    # A std is the branch's init variance, and A itself changes with a
    sizes = [plan.multipliers.output[0] * plan.multipliers.route[0] * s for plan, s in zip(plans, stds, strict=True)]
    assert sizes[0] == pytest.approx(sizes[1])


@pytest.mark.parametrize("entropy", [1.0, 0.0])
def test_the_entropy_loss_is_what_brakes(entropy: float) -> None:
    """Trained on its losses alone the router comes to use half the experts; without that loss it uses as many as before (the control)."""
    torch.manual_seed(2)
    router, x_TD = made(std=0.3, losses={"entropy": entropy, "load_balance": 1e-2}), torch.randn(200, 6)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)

    def active() -> float:
        return float(router(x_TD).stats["load"].sum()) / len(x_TD)

    before = active()
    for _ in range(30):
        optimizer.zero_grad()
        torch.stack(list(router(x_TD).losses.values())).sum().backward()
        optimizer.step()
    assert active() < before / 2 if entropy else active() > 0.8 * before


@pytest.mark.parametrize("p", [0.0, -0.1, 1.5, float("nan"), True, "0.4"])
def test_p_is_above_0_and_at_most_1(p: object) -> None:
    with pytest.raises(ValueError, match="p of the top-p router must be"):
        mue.MoE.parse("8e2a", width=32, expert=16, layers=1, head_dim=16, router="top-p", router_settings={"p": p})
