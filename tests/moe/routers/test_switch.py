"""mue.moe.routers.switch: who is chosen, who finds room, what is drawn, against a loop in float64."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mue.moe import MoELayer, Routing
from mue.moe.losses.balance import load_balance
from mue.moe.routers.base import RouterInput, RouterOptions
from mue.moe.routers.switch import SwitchRouter, first_come, jittered, moments
from support.precision import close

PLAIN = {"jitter": 0.0, "random_second": False}


def made(experts: int = 8, active: int = 2, width: int = 6, std: float = 1.0, **given: object) -> SwitchRouter:
    chosen = {**PLAIN, **given}
    options = {k: chosen.pop(k) for k in ("route_scale", "seed", "layer") if k in chosen}
    router = SwitchRouter(width, experts, active, options=RouterOptions(settings=chosen, **options))  # type: ignore[arg-type]
    torch.nn.init.normal_(router.weight, std=std / width**0.5)
    return router


def table(routing: Routing) -> tuple[Tensor, Tensor]:
    return routing.expert_P.view(-1, routing.slots), routing.weight_P.view(-1, routing.slots)


def by_loop(x_TD: Tensor, weight_ND: Tensor, active: int, capacity: float) -> list[dict[int, float]]:
    """Each token's experts and weights, one choice after the other: all first ones, then all second ones."""
    logit_TN = (x_TD.double() @ weight_ND.double().T).tolist()
    tokens, experts = len(logit_TN), len(weight_ND)
    room = [math.ceil(capacity * tokens * active / experts)] * experts
    parts = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logit_TN]
    order = [sorted(range(experts), key=lambda e: -row[e])[:active] for row in parts]
    found: list[dict[int, float]] = [{} for _ in range(tokens)]
    for rank in range(active):
        for t, best in enumerate(order):
            if room[best[rank]]:
                room[best[rank]] -= 1
                whole = 1.0 if active == 1 else sum(parts[t][e] for e in best)
                found[t][best[rank]] = parts[t][best[rank]] / whole
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    experts=st.integers(2, 9),
    active=st.integers(1, 2),
    tokens=st.integers(9, 40),
    capacity=st.sampled_from([1.0, 1.25, 2.0]),
)
def test_choices_room_and_weights_are_the_papers(
    seed: int, experts: int, active: int, tokens: int, capacity: float
) -> None:
    torch.manual_seed(seed)
    router = made(experts, active, capacity=capacity, route_scale=3.0)
    x_TD = torch.randn(6) + torch.randn(tokens, 6)  # they lean the same way, so that some experts overflow
    expert_TK, weight_TK = table(router(x_TD))
    for own, chosen, weights in zip(
        by_loop(x_TD, router.weight, active, capacity), expert_TK.tolist(), weight_TK.tolist(), strict=True
    ):
        assert {e for e in chosen if e < experts} == set(own)
        for expert, weight in zip(chosen, weights, strict=True):
            assert weight == pytest.approx(3.0 * own.get(expert, 0.0), rel=1e-5)
    assert router(x_TD).stats["load"].max() <= math.ceil(capacity * tokens * active / experts)


def test_control_without_room_for_all_the_loop_finds_less() -> None:
    torch.manual_seed(0)
    x_TD = torch.randn(6) + torch.randn(40, 6)
    router = made(capacity=1.0)
    kept = [sum(map(len, by_loop(x_TD, router.weight, 2, factor))) for factor in (1.0, 100.0)]
    assert int(router(x_TD).stats["load"].sum()) == kept[0] < kept[1] == 80


@pytest.mark.parametrize("active", [1, 2])
def test_the_balance_loss_counts_what_was_asked_for(active: int) -> None:
    """N·Σ f·P in float64, f before anything is dropped or spared; with what is left of it, it would be another number."""
    torch.manual_seed(8)
    router, x_TD = made(4, active, capacity=0.5, random_second=True), 0.5 * torch.randn(6) + torch.randn(40, 6)
    assert router.losses == [("load_balance", 0.01, load_balance)]
    routing = router(x_TD)
    part_TN = (x_TD.double() @ router.weight.detach().double().T).softmax(1)
    share_N = torch.bincount(part_TN.topk(active, 1).indices.flatten(), minlength=4) / (40 * active)
    exact = 0.01 * 4 * (share_N * part_TN.mean(0)).sum()
    assert float(routing.losses["load_balance"].detach()) == pytest.approx(float(exact), rel=1e-5)
    left_N = routing.stats["load"] / routing.stats["load"].sum()
    assert float(0.01 * 4 * (left_N * part_TN.mean(0)).sum()) < 0.99 * float(exact)  # control


@pytest.mark.parametrize("active", [1, 2])
def test_what_is_dropped_keeps_its_residual_stream(active: int) -> None:
    torch.manual_seed(1)
    layer = MoELayer(6, made(4, active, capacity=0.5), 5)
    x_TD = (torch.randn(6) + 0.3 * torch.randn(40, 6)).requires_grad_()
    y_TD, routing = layer(x_TD)
    dropped_T = (table(routing)[0] == 4).all(1)
    assert 0 < dropped_T.sum() < 40
    assert (y_TD[dropped_T] == 0).all() and (y_TD[~dropped_T] != 0).any(1).all()
    (gradient,) = torch.autograd.grad(y_TD.square().sum(), x_TD)
    assert (gradient[dropped_T] == 0).all() and gradient.isfinite().all()


def test_in_evaluation_there_is_room_for_all_unless_said() -> None:
    torch.manual_seed(2)
    router, x_TD = made(capacity=0.5), torch.randn(6) + torch.randn(64, 6)
    assert router(x_TD).stats["load"].sum() < 128
    assert router.eval()(x_TD).stats["load"].sum() == 128
    tight = made(capacity=0.5, evaluation_capacity=1.0).eval()
    tight.load_state_dict(router.state_dict())
    assert tight(x_TD).stats["load"].max() == 16
    assert tight(x_TD[:1]).stats["load"].sum() == 2  # of one token (generation) nothing is dropped


def test_no_later_token_is_read_in_evaluation() -> None:
    torch.manual_seed(3)
    router, x_TD = made(capacity=1.0), torch.randn(6) + torch.randn(64, 6)
    second = int(
        table(router.eval()(x_TD))[0][:40, 1].mode().values
    )  # what most of the first 40 have as their second choice
    other_TD = torch.cat([x_TD[:40], 9 * router.weight[second].detach().expand(24, -1)])
    for mode, reads in (
        (True, True),
        (False, False),
    ):  # in training first choices of later tokens come before second ones
        router.train(mode)
        before, after = (torch.cat([t.float()[:40] for t in table(router(x))], 1) for x in (x_TD, other_TD))
        assert torch.equal(before, after) != reads
    one = made(active=1, capacity=1.0)  # and with one expert none, in training either
    assert torch.equal(table(one(x_TD))[0][:40], table(one(x_TD[:40].repeat(2, 1)[:64]))[0][:40])


def test_the_second_expert_is_used_with_twice_its_weight_for_probability() -> None:
    torch.manual_seed(4)
    router, x_TD, steps = made(random_second=True, capacity=8.0, std=1.5), torch.randn(20, 6), 500
    always_TK, weight_TK = table(made_like(router, random_second=False)(x_TD))
    used_T = torch.zeros(20)
    for _ in range(steps):
        expert_TK, own_TK = table(router(x_TD))
        assert torch.equal(expert_TK[:, 0], always_TK[:, 0])  # the first always
        here_T = expert_TK[:, 1] != 8
        assert torch.equal(own_TK[here_T], weight_TK[here_T])  # and neither weight depends on the draw
        used_T += here_T
        router.end_step_(0.0)
    p_T = 2 * weight_TK[:, 1]
    assert ((used_T - steps * p_T).abs() <= 4 * (steps * p_T * (1 - p_T)).sqrt() + 1).all()
    assert (
        (used_T - steps * weight_TK[:, 1]).abs() > 4 * (steps * p_T * (1 - p_T)).sqrt() + 1
    ).any()  # control: w, not 2·w
    assert torch.equal(table(router.eval()(x_TD))[0], always_TK)


def made_like(router: SwitchRouter, **given: object) -> SwitchRouter:
    other = made(router.experts, router.active, router.width, **{"capacity": 8.0, **given})
    other.load_state_dict(router.state_dict())
    return other


def test_draws_are_of_seed_layer_step_and_pass_and_replay() -> None:
    torch.manual_seed(5)
    router, x_TD = made(random_second=True, jitter=0.1, capacity=8.0, seed=1, layer=2), torch.randn(200, 6)
    once = table(router(x_TD))
    assert all(torch.equal(a, b) for a, b in zip(once, table(router(x_TD)), strict=True))
    for change in ({"seed": 2, "layer": 2}, {"seed": 1, "layer": 3}):
        other = made_like(router, random_second=True, jitter=0.1, **change)
        assert not torch.equal(table(other(x_TD))[1], once[1])
    assert not torch.equal(table(router(x_TD, RouterInput(draw=1)))[1], once[1])
    router.end_step_(0.0)
    assert not torch.equal(table(router(x_TD))[1], once[1])
    resumed = made_like(router, random_second=True, jitter=0.1, seed=1, layer=2)
    assert torch.equal(table(resumed(x_TD))[1], table(router(x_TD))[1])


def test_jitter_is_even_and_small_and_only_in_training() -> None:
    factor_TD = jittered(torch.ones(2000, 30), 0.25, torch.tensor(3))
    assert factor_TD.shape == (2000, 30) and factor_TD.min() >= 0.75 and factor_TD.max() < 1.25
    noise_TD, few = (factor_TD - 1) / 0.25, 5 / math.sqrt(8000)  # as many numbers are in the table
    assert noise_TD.mean().abs() < few / math.sqrt(3) and abs(noise_TD.square().mean() - 1 / 3) < few
    assert (torch.corrcoef(noise_TD.T) - torch.eye(30)).abs().max() < 6 / math.sqrt(
        2000
    )  # features are no copies of each other
    twins = (noise_TD[:, None, 0] == noise_TD[None, :, 0]).float().sum() / 2000 - 1  # nor are tokens, but for few
    assert twins < 0.5
    torch.manual_seed(6)
    router, x_TD = made(jitter=0.05, capacity=8.0), torch.randn(100, 6)
    plain = table(router.eval()(x_TD))[1]
    moved = (table(router.train()(x_TD))[1] - plain).abs().max()
    assert 0 < moved < 0.2 and torch.equal(table(made_like(router)(x_TD))[1], plain)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 70))
def test_who_comes_first_finds_room(experts: list[int], room: int) -> None:
    found = first_come(torch.tensor(experts, dtype=torch.int64), 5, room).tolist()
    assert found == [experts[:i].count(e) < room for i, e in enumerate(experts)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_gradient_of_jitter_is_that_of_a_product(dtype: torch.dtype) -> None:
    """The factors are made again for it; bit for bit, in the type of a product with float32."""
    x_TD, dy_TD = torch.randn(2, 50, 6).to(dtype)
    factor_TD = jittered(torch.ones(50, 6), 0.25, torch.tensor(3))
    found = []
    for product in (lambda x_TD: x_TD * factor_TD, lambda x_TD: jittered(x_TD, 0.25, torch.tensor(3))):
        leaf_TD = x_TD.clone().requires_grad_()
        y_TD = product(leaf_TD)
        y_TD.backward(dy_TD.to(y_TD.dtype))
        found.append((y_TD.detach(), leaf_TD.grad))
    for plain, own in zip(*found, strict=True):
        assert plain.dtype == own.dtype and torch.equal(plain, own)


@pytest.mark.parametrize("active", [1, 2])
def test_nothing_is_drawn_where_no_noise_is_asked_for(active: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def bits(*keys: object, device: object = None) -> Tensor:
        raise AssertionError("drawn")

    monkeypatch.setattr("mue.moe.routers.switch.bits", bits)
    x_TD = torch.randn(40, 6)
    made(active=active)(x_TD)
    noisy = made(active=active, jitter=0.1, random_second=True)
    noisy.eval()(x_TD)
    for wants, own in ((True, {"jitter": 0.1}), (active == 2, {"random_second": True})):  # the control
        with pytest.raises(AssertionError, match="drawn") if wants else contextlib.nullcontext():
            made(active=active, **own)(x_TD)


@pytest.mark.parametrize(("experts", "active"), [(4, 1), (8, 1), (64, 1), (4, 2), (8, 2), (64, 2)])
@pytest.mark.parametrize("std", [0.0, 0.3, 0.6])
def test_moments_are_those_of_gaussian_logits(experts: int, active: int, std: float) -> None:
    """Against drawn tokens in float64 (0.3 % on m1): exact for two experts, the stated bounds for one."""
    logit_TN = std * torch.randn(200_000 // experts, experts, dtype=torch.float64)
    best_TK = logit_TN.topk(active, dim=1).values
    if active == 1:
        w_T = logit_TN.softmax(1).amax(1)
        found = float(w_T.mean()), float(w_T.square().mean())
    else:
        w_TK = best_TK.softmax(1)
        p_T = 2 * w_TK[:, 1]
        found = tuple(float((w_TK[:, 0] ** n + p_T * w_TK[:, 1] ** n).mean()) for n in (1, 2))
    stated = (0.025, 0.07) if active == 1 else (0.005, 0.005)
    for ours, measured, bound in zip(
        moments(active, experts, {"random_second": True, "logit_std": std}), found, stated, strict=True
    ):
        assert ours == pytest.approx(measured, rel=bound)
    if active == 1 and std > 0:  # control: what even logits would have is far off
        assert found[0] > 1.25 / experts


def test_float64_is_kept_and_autocast_changes_nothing() -> None:
    torch.manual_seed(7)
    router, x_TD = made(width=64, jitter=0.01), torch.randn(50, 64)
    plain = router(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = router(x_TD)
    assert torch.equal(plain.expert_P, again.expert_P) and close(again.weight_P, plain.weight_P, operations=64 + 8)
    assert router.double()(x_TD.double()).weight_P.dtype == torch.float64


def test_refusals_name_the_numbers_and_the_fix() -> None:
    with pytest.raises(ValueError, match=r"uses 1 expert per token \(Switch\) or 2 \(GShard\), got 3 active"):
        made(8, 3)
    for wrong in ({"capacity": 0.0}, {"capacity": -1.0}, {"jitter": 1.0}, {"evaluation_capacity": -0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            made(**wrong)
    with pytest.raises(ValueError, match=r"no setting 'capcity'; did you mean 'capacity'"):
        made(capcity=1.0)
    router = made(8, 1, capacity=0.1)
    with pytest.raises(ValueError, match=r"room for 0\.5 of 40 tokens, which drops them all: set it to 0\.2 or more"):
        router(torch.randn(40, 6))
    assert router.eval()(torch.randn(40, 6)).num_pairs == 40
    assert router.train()(torch.randn(0, 6)).num_pairs == 0
