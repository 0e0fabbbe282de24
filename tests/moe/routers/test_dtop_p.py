"""mue.moe.routers.dtop_p (2512.13996): what p means, the controller on it, the start that is known without training."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mue
from mue.lab.models.language import LanguageModel
from mue.moe import gate_moments
from mue.moe.routers.at_init import at_init, mass_for
from mue.moe.routers.base import RouterOptions, share
from mue.moe.routers.dtop_p import DTopPRouter


def made(experts: int = 16, active: int = 4, width: int = 8, std: float = 1.0, **given: object) -> DTopPRouter:
    router = DTopPRouter(width, experts, active, options=RouterOptions(route_scale=float(active), settings=given))
    torch.nn.init.normal_(router.weight, std=std)
    return router


def mean_active(router: DTopPRouter, x_TD: Tensor) -> float:
    return float(router(x_TD).stats["load"].sum()) / len(x_TD)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    experts=st.integers(2, 20),
    start=st.floats(0.01, 1.0),
    theta=st.floats(0.1, 3.0),
)
def test_against_a_plain_loop_in_float64(seed: int, experts: int, start: float, theta: float) -> None:
    torch.manual_seed(seed)
    router = made(experts, 1, start=start).double()
    router.theta.data.fill_(theta)
    x_TD = torch.randn(10, 8, dtype=torch.float64)
    routing = router(x_TD)
    for token, row in enumerate((x_TD @ router.weight.T).tolist()):
        mean = math.fsum(row) / experts
        std = math.sqrt(math.fsum((z - mean) ** 2 for z in row) / experts)
        raw = [math.exp(theta * (z - mean) / std) for z in row]
        ranked = sorted(((value / math.fsum(raw), e) for e, value in enumerate(raw)), reverse=True)
        sums = [math.fsum(value for value, _ in ranked[: k + 1]) for k in range(experts)]
        if min(abs(total - start) for total in sums) < 1e-6:
            continue  # which side rounding falls on is open
        count = next((k + 1 for k, total in enumerate(sums) if total >= start and start < 1.0), experts)
        own = routing.weight_P.view(10, -1)[token], routing.expert_P.view(10, -1)[token]
        used = own[1] < experts
        found = dict(zip(own[1][used].tolist(), own[0][used].tolist(), strict=True))
        assert found == pytest.approx({e: value / sums[count - 1] for value, e in ranked[:count]}, rel=1e-5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.05, 50.0), shift=st.floats(-5.0, 5.0))
def test_affine_changes_of_the_logits_change_nothing(seed: int, scale: float, shift: float) -> None:
    """z → αz + β, α > 0, in float64. Of a softmax's logits, α is another distribution (the control)."""
    torch.manual_seed(seed)
    router, other = made().double(), made().double()
    x_TD = torch.cat([torch.randn(20, 7), torch.ones(20, 1)], 1).double()  # a column of ones: β in every expert's row
    other.weight.data = router.weight.data * scale
    other.weight.data[:, -1] += shift
    plain, changed = router(x_TD), other(x_TD)
    assert torch.equal(plain.expert_P, changed.expert_P)
    torch.testing.assert_close(plain.weight_P, changed.weight_P)
    if abs(math.log(scale)) > 0.1:
        soft = [(x_TD @ r.weight.T).softmax(1) for r in (router, other)]
        assert (soft[0] - soft[1]).abs().max() > 1e-3


def test_weights_sum_to_the_route_scale_and_p_has_its_ends() -> None:
    x_TD = torch.randn(50, 8)
    for start, count in ((1.0, 16), (1e-3, 1)):
        routing = made(start=start)(x_TD)
        assert routing.slots == count and (routing.expert_P < 16).all()
        torch.testing.assert_close(routing.weight_P.view(50, -1).sum(1), torch.full((50,), 4.0))
    torch.testing.assert_close(made()(x_TD).weight_P.view(50, -1).sum(1), torch.full((50,), 4.0))
    same = made()
    same.weight.data[:] = 0  # no spread at all: even scores, and no 0/0
    assert same(x_TD).weight_P.isfinite().all()


@pytest.mark.parametrize(
    ("experts", "active", "p"),
    [(8, 2, 0.508), (16, 2, 0.331), (16, 4, 0.571), (32, 4, 0.389), (64, 8, 0.415), (128, 8, 0.277), (128, 16, 0.428)],
)
def test_the_start_is_calibrated(experts: int, active: int, p: float) -> None:
    """Against numbers from another simulation, to 0.003; and a router drawn with any std has a experts active, and m2 as planned."""
    start = mass_for(active, experts)
    mean, _, _, square = at_init(experts, start, None)
    assert start == pytest.approx(p, abs=0.003) and mean == pytest.approx(active, rel=1e-3)
    torch.manual_seed(experts)
    x_TD = torch.randn(3000, 128)
    for std in (1e-3, 1.0):
        router = made(experts, active, 128, std)
        assert router.kind.moments is not None
        assert router.kind.moments(active, experts, router.options.settings) == (1.0, square)
        m1, m2 = gate_moments(router(x_TD))
        assert m1 == pytest.approx(1.0, abs=1e-5) and m2 == pytest.approx(square, rel=0.05)
        assert mean_active(router, x_TD) == pytest.approx(active, rel=0.06)
    assert abs(square * active - 1) > 0.1  # the control: weights 1/a each would have had m2 = 1/a


def test_theta_is_a_gain_of_every_layer() -> None:
    """Planned and trained like the gain of a norm: from 1, at a rate that no width changes, without decay."""
    target = mue.MoE.parse("8e2a", width=64, expert=32, layers=3, head_dim=16, sequence=16, router="dtop-p")
    plan = mue.transfer(mue.Dense(32, 32, 3, head_dim=16), target, mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1))
    model = LanguageModel(target, plan.multipliers)
    plan.init_(model)
    thetas = [p for name, p in model.named_parameters() if name.endswith("router.theta")]
    assert len(thetas) == 3 and all(p.item() == 1.0 for p in thetas)
    (group,) = [g for g in plan.param_groups(model) if any(p is thetas[0] for p in g["params"])]
    assert group["lr"] == pytest.approx(0.01) and group["weight_decay"] == 0
    assert sum(p.numel() for p in model.parameters()) == target.parameters
    router = plan.roles["router"].values
    assert router.lr != pytest.approx(0.01)  # the control: a matrix's is changed


def test_counts_are_means_of_what_was_trained_on() -> None:
    torch.manual_seed(0)
    one, twice = made(), made()
    twice.load_state_dict(one.state_dict())
    x_TD = torch.randn(64, 8)
    one.eval()
    one(x_TD)
    assert one.tokens == 0 and one.error() == 0  # evaluation leaves no trace, and nothing routed is no error
    one.train()(x_TD)
    assert float(one.error()) == pytest.approx((4 - mean_active(copy.deepcopy(one), x_TD)) / 16)
    twice(x_TD)
    twice(x_TD)  # recomputed
    for router in (one, twice):
        router.end_step_(0.0)
        assert router.tokens == 0 and router.pairs == 0
    assert one.p == twice.p != made().p
    half, rest = made(), torch.randn(64, 8)
    half.load_state_dict(one.state_dict())
    half(x_TD)
    half(rest)  # accumulated
    error = half.error()
    half.forget_()
    half(torch.cat([x_TD, rest]))
    assert half.error() == error


def model_of(layers: int, **given: object) -> tuple[list[DTopPRouter], torch.nn.Module | None]:
    routers = [made(**given) for _ in range(layers)]  # type: ignore[arg-type]
    return routers, share(routers)


def test_one_p_for_the_model_or_one_for_each_layer() -> None:
    torch.manual_seed(1)
    routers, common = model_of(3)
    assert common is not None and all(one.controller is None and one.p is routers[0].p for one in routers)
    names = set(common.state_dict())
    assert {name.rsplit(".", 1)[-1] for name in names} == {"p", "error_sum"} and len(names) == 2
    routers[0].theta.data.fill_(3.0)  # one layer is off: all of them get another p
    apart, none = model_of(3, control="layer")
    assert none is None
    apart[0].theta.data.fill_(3.0)
    before = float(routers[0].p)
    for group in (routers, apart):
        for one in group:
            one(torch.randn(500, 8))
            one.end_step_(0.0)
    common.end_step_(0.0)  # type: ignore[operator]
    assert float(routers[0].p) > before and all(one.tokens == 0 for one in routers)
    assert float(apart[0].p) > before + 0.05 and abs(float(apart[1].p) - before) < 0.05
    both = copy.deepcopy(torch.nn.ModuleList([*routers, common]))
    assert both[0].p is not routers[0].p and both[0].p is both[1].p  # a copied model is controlled by its own


def controlled(routers: Sequence[DTopPRouter], common: torch.nn.Module | None, steps: int, drift: float) -> Tensor:
    """(steps, layers) mean numbers of active experts, while θ grows by ``drift`` a step as training sharpens it."""
    counts = []
    for _ in range(steps):
        counts.append([mean_active(one, torch.randn(120, 8)) for one in routers])
        for one in routers:
            one.end_step_(0.0)
            one.theta.data *= 1 + drift
        if common is not None:
            common.end_step_(0.0)  # type: ignore[operator]
    return torch.tensor(counts)


@pytest.mark.parametrize("control", ["model", "layer"])
def test_the_controller_holds_its_target(control: str) -> None:
    """Through a drift of θ by two thirds and a sudden ×2: within 0.25 before, again within 20 steps, and a fixed p is not (the
    control)."""
    torch.manual_seed(2)
    routers, common = model_of(3, control=control)
    late = controlled(routers, common, 100, 0.005)[-40:].mean(1)
    assert abs(float(late.mean()) - 4) <= 0.25
    for one in routers:
        one.theta.data *= 2
    shocked = controlled(routers, common, 40, 0.0)
    assert abs(float(shocked[0].mean()) - 4) > 1.0 and ((shocked[20:].mean(1) - 4).abs() <= 0.5).all()
    if control == "layer":
        assert ((shocked[20:].mean(0) - 4).abs() <= 0.25).all()
    for one in routers:
        one.weight.data *= 2  # the logits' size is nothing to it: no disturbance at all
    assert ((controlled(routers, common, 3, 0.0).mean(1) - 4).abs() <= 0.5).all()
    fixed, shared = model_of(3, control=control, proportional=0.0, integral=0.0)
    drifted = controlled(fixed, shared, 100, 0.005)[-40:].mean(1)
    assert abs(float(drifted.mean()) - 4) > 0.5 and late.std() < drifted.std() / 2


def test_refusals() -> None:
    common = {"width": 32, "expert": 16, "layers": 1, "head_dim": 16, "router": "dtop-p"}
    with pytest.raises(ValueError, match="9 active of 8 experts"):  # a target that no p reaches
        mue.MoE.parse("8e9a", **common)
    for given_, message in (
        ({"start": 0.0}, "start of the dtop-p router must be"),
        ({"start": 1.1}, "start of the dtop-p router must be"),
        ({"control": "modle"}, "did you mean 'model'"),
        ({"integral": -1.0}, "integral of the dtop-p router must be"),
        ({"integrl": 1.0}, "no setting 'integrl'; did you mean 'integral'"),
    ):
        with pytest.raises(ValueError, match=message):
            mue.MoE.parse("8e2a", router_settings=given_, **common)


def test_layers_that_share_a_controller_agree_in_it() -> None:
    """Each has a start of its own, for p_0 is their mean; the controller's two factors are one for all."""
    two = [
        DTopPRouter(8, 16, 4, options=RouterOptions(layer=i, settings={"start": s})) for i, s in ((0, 0.2), (3, 0.4))
    ]
    shared = share(two)
    assert shared is not None and float(two[0].p) == pytest.approx(0.3)
    for control, refused in (("model", True), ("layer", False)):
        other = {"control": control, "integral": 0.1}
        ends = [
            DTopPRouter(8, 16, 4, options=RouterOptions(layer=i, settings=s))
            for i, s in ((0, {"control": control}), (3, other))
        ]
        with (
            pytest.raises(ValueError, match=r"layers 0 and 3 .* integral = 1\.5 and 0\.1") if refused else nullcontext()
        ):
            share(ends)
