"""NormRouter and the pool's balance: its constants against draws, its scores against a loop, what the loss is and does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mue
from mue.lab.models.language import LanguageModel
from mue.moe import ExpertPool, MoELayer, Routing, gate_moments
from mue.moe.routers.base import RouterOptions, share
from mue.moe.routers.unipool import SLIGHT, UniPoolRouter, norm_constant, norm_moments

# 2605.06665 gives c0 as a mean over draws: these are such means, of another implementation, to three digits.
PUBLISHED = {
    (96, 1): 4.01, (128, 1): 4.45, (192, 1): 5.15, (288, 1): 6.01, (384, 1): 6.72, (64, 8): 1.71, (128, 8): 2.04, (192, 2): 3.84,
    (384, 4): 3.76, (16, 2): 1.91,
}  # fmt: skip
# E[Σ w], likewise
SUMS = {(96, 1): 1.02, (192, 2): 1.43, (384, 4): 2.00, (64, 8): 2.78, (128, 8): 2.80}
SILENT = {"losses": {"pool_balance": 0.0}}  # of a router alone, whose pool nobody else reads


def alone(width: int, experts: int, active: int, **options: Any) -> UniPoolRouter:
    return UniPoolRouter(width, experts, active, options=RouterOptions(settings=SILENT, **options)).double()


# ---- what the weights are at the start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "active"), PUBLISHED)
def test_the_constant_is_the_published_one(experts: int, active: int) -> None:
    assert norm_constant(active, experts) == pytest.approx(PUBLISHED[experts, active], rel=2.5e-3)
    if (experts, active) in SUMS:
        assert norm_moments(active, experts)[0] == pytest.approx(SUMS[experts, active], rel=5e-3)


@pytest.mark.parametrize(("experts", "active"), [(2, 1), (4, 4), (8, 3), (16, 1), (24, 23), (40, 6), (256, 128)])
def test_constant_and_moments_are_those_of_draws(experts: int, active: int) -> None:
    """Independent normals, five standard errors; without the ReLU, or for one expert more, they are others (negative control)."""
    generator = torch.Generator().manual_seed(experts)
    u = torch.randn(200_000 // max(1, experts // 8), experts, generator=generator, dtype=torch.float64)

    def best(relu: bool, k: int) -> Tensor:
        return (u.clamp(min=0) if relu else u.abs()).topk(k, 1).values

    def error(values: Tensor) -> float:
        return float(values.std() / math.sqrt(len(values)))

    length, counted = u.norm(dim=1), u.amax(1) > SLIGHT
    # as it is defined: both factors on their own, so that what is left out says nothing of the length
    inverse = 1 / best(True, active).norm(dim=1)[counted]
    c0 = float(inverse.mean() / (1 / length).mean()) if experts > 2 else norm_constant(active, experts)
    assert c0 == pytest.approx(norm_constant(active, experts), abs=5 * error(inverse) * float(length.mean()) + 1e-9)
    first, second = norm_moments(active, experts)
    sums = norm_constant(active, experts) * best(True, active) / length[:, None]
    assert first == pytest.approx(float(sums.sum(1).mean()), abs=5 * error(sums.sum(1)))
    assert second == pytest.approx(float(sums.square().sum(1).mean()), abs=5 * error(sums.square().sum(1)))
    other = norm_constant(active, experts) * best(False, active) / length[:, None]
    assert abs(first - float(other.sum(1).mean())) > 10 * error(sums.sum(1))


@pytest.mark.parametrize(("experts", "active"), [(96, 1), (128, 8), (192, 2), (64, 8), (384, 4)])
def test_weights_are_about_sigma_long_at_the_start(experts: int, active: int) -> None:
    """Within 3 %, over routers as a plan draws them; R is divided out. Without c0 they are not (negative control)."""
    torch.manual_seed(experts)
    lengths, moments = [], []
    for scale in (1.0, 0.5):
        for _ in range(4):
            router = alone(48, experts, active, route_scale=3.0)
            with torch.no_grad():
                router.scale.fill_(scale)
                routing = router(torch.randn(400, 48, dtype=torch.float64))
            weight_TK = routing.weight_P.view(-1, active) / 3.0
            lengths.append(float(weight_TK.norm(dim=1).mean()) / scale)
            moments.append([m / scale**n for n, m in enumerate(gate_moments(routing), start=1)])
    assert sum(lengths) / len(lengths) == pytest.approx(1, abs=0.03)
    assert sum(lengths) / len(lengths) / norm_constant(active, experts) != pytest.approx(1, abs=0.3)
    for n, planned in enumerate(norm_moments(active, experts)):
        assert sum(m[n] for m in moments) / len(moments) == pytest.approx(planned, rel=0.03)


# ---- scores ------------------------------------------------------------------------------------------------------------------


def by_hand(x_TD: Tensor, router: UniPoolRouter) -> list[dict[int, float]]:
    """Token by token: the a largest logits with σ · c0 · ReLU(z/‖z‖) · R."""
    found = []
    for x in x_TD:
        z = [float(x @ row) for row in router.weight.detach()]
        size = math.sqrt(sum(v * v for v in z)) + 1e-8
        best = sorted(range(len(z)), key=lambda i: -z[i])[: router.active]
        factor = float(router.scale.detach()) * norm_constant(router.active, router.experts) * router.route_scale
        found.append({i: factor * max(z[i], 0.0) / size for i in best})
    return found


def weights(routing: Routing, active: int) -> list[dict[int, float]]:
    expert_TK, weight_TK = routing.expert_P.view(-1, active), routing.weight_P.detach().view(-1, active)
    return [dict(zip(e.tolist(), w.tolist(), strict=True)) for e, w in zip(expert_TK, weight_TK, strict=True)]


# the same examples in every run: experts are chosen in float32, where two of a million logits are as good as each other
@settings(max_examples=30, derandomize=True)
@given(st.integers(2, 12), st.data(), st.integers(0, 999), st.floats(-3, 3))
def test_scores_are_those_of_a_loop_and_know_no_scale(
    experts: int, data: st.DataObject, seed: int, octaves: float
) -> None:
    active = data.draw(st.integers(1, experts))
    torch.manual_seed(seed)
    router, x_TD = alone(5, experts, active, route_scale=1.5), torch.randn(7, 5, dtype=torch.float64)
    with torch.no_grad():
        router.weight.normal_()
        router.scale.fill_(0.7)
    routing = router(x_TD)
    for ours, exact in zip(weights(routing, active), by_hand(x_TD, router), strict=True):
        assert ours.keys() == exact.keys() and ours == pytest.approx(exact, rel=1e-9)
    with torch.no_grad():
        router.weight.mul_(2**octaves)
    scaled = router(x_TD)
    assert torch.equal(scaled.expert_P, routing.expert_P)
    torch.testing.assert_close(scaled.weight_P, routing.weight_P, rtol=1e-6, atol=1e-12)
    with torch.no_grad():  # negative control: what scales one expert's logits alone is seen
        router.weight[0] *= 3
    assert not torch.allclose(router(x_TD).scores_TN, routing.scores_TN, rtol=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["negative", "nothing"])
def test_a_token_that_no_expert_wants_passes(what: str) -> None:
    """All logits negative, or all zero: no output, finite gradients everywhere, and the other tokens are as they were."""
    torch.manual_seed(5)
    router, pool = alone(6, 8, 2), ExpertPool(6, 8, 4).double()
    layer = MoELayer(6, router, 4, pool=pool)
    x_TD = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        x_TD[:, 0] = 0.0
        x_TD[2] = 0.0 if what == "nothing" else torch.tensor([1.0, 0, 0, 0, 0, 0])
        router.weight[:, 0] = -0.1
    x_TD.requires_grad_()
    y_TD, routing = layer(x_TD)
    assert not y_TD[2].any() and y_TD[[0, 1, 3, 4]].any(1).all()
    assert (weights(routing, 2)[2].values()) and not any(weights(routing, 2)[2].values())
    gradients = torch.autograd.grad(y_TD.square().sum(), [x_TD, *router.parameters(), *pool.parameters()])
    assert all(bool(g.isfinite().all()) for g in gradients) and all(bool(g.any()) for g in gradients)
    torch.testing.assert_close(layer(x_TD[[0, 1]])[0], y_TD[[0, 1]])


def test_it_is_in_full_precision_under_autocast() -> None:
    torch.manual_seed(6)
    router, x_TD = alone(32, 16, 2).float(), torch.randn(200, 32)
    exact = router(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x_TD)
    assert torch.equal(routing.expert_P, exact.expert_P) and torch.equal(routing.weight_P, exact.weight_P)
    rounded = router(x_TD.bfloat16())  # negative control: rounded tokens have other weights
    assert rounded.weight_P.dtype == torch.float32 and not torch.equal(rounded.weight_P, exact.weight_P)


def test_what_it_refuses() -> None:
    numbers: dict[str, Any] = {"width": 32, "expert": 16, "layers": 4, "head_dim": 16, "router": "unipool"}
    for notation, message in (
        ("1e1a", "needs at least 2 of them"),
        ("8e2a2g", "knows no groups"),
        ("8e2a3p", "3 pools do not divide the 4 layers"),
        ("8e2a8p", "8 pools of experts for 4 layers: no layer would read some of them"),
    ):
        with pytest.raises(ValueError, match=message):
            mue.MoE.parse(notation, **numbers)
    with pytest.raises(ValueError, match="nothing to normalise"):
        mue.MoE.parse("8e2a", **numbers, normalize=False)
    with pytest.raises(ValueError, match="has no setting 'normalize_scores'; did you mean 'normalise_scores'"):
        mue.MoE.parse("8e2a", **numbers, router_settings={"normalize_scores": True})
    with pytest.raises(ValueError, match=r"this routing has none: .*mue\.moe\.routers\.base\.share"):
        UniPoolRouter(6, 8, 2)(torch.randn(3, 6))
    assert mue.MoE.parse("8e2a", **numbers).notation == "8e2a1p" == mue.MoE.parse("8e2a1p", **numbers).notation


# ---- the balance of the pool ---------------------------------------------------------------------------------------------------


def readers(normalise: bool, layers: int = 3, coefficient: float = 0.25) -> list[UniPoolRouter]:
    torch.manual_seed(8)
    own = {"normalise_scores": normalise, "losses": {"pool_balance": coefficient}}
    made = [UniPoolRouter(6, 8, 2, options=RouterOptions(settings=own, layer=i)).double() for i in range(layers)]
    common = share(made)
    assert common is not None and all(one.common is common["unipool"] for one in made)
    return made


@pytest.mark.parametrize("normalise", [False, True])
def test_the_loss_is_that_of_the_pool(normalise: bool) -> None:
    """λ · N · Σ f_i · P̄_i with the load of the last step, of all layers; 0 in the first step; λ at balance for shares."""
    routers = readers(normalise)
    x_TD = torch.randn(40, 6, dtype=torch.float64)
    first = [one(x_TD) for one in routers]
    assert all(r.losses["pool_balance"].item() == 0 for r in first)
    routers[0](x_TD)  # a block whose forward pass runs twice counts as much as the others
    load_LN = torch.stack([r.stats["load"] for r in first]).double()
    f_N = load_LN.sum(0) / load_LN.sum()
    assert not torch.allclose(load_LN[0] / load_LN[0].sum(), f_N, atol=0.02)  # so that one layer's own load would show
    for one in routers:
        one.end_step_(0.0)
    routers[0].common.end_step_(0.0)  # type: ignore[union-attr, operator]
    second = [one(x_TD) for one in routers]
    scores = [r.scores_TN for r in second]
    P_N = sum(s.mean(0) for s in scores) / 3  # type: ignore[union-attr]
    total = sum(r.losses["pool_balance"] for r in second)
    assert float(total) == pytest.approx(0.25 * 8 * float((f_N * P_N).sum()), rel=1e-6)
    raw = [one.scale * one.constant * (z := one.weight @ x_TD.T).clamp(min=0) / z.norm(dim=0) for one in routers]
    by_hand = [s / s.sum(0).clamp(min=1e-30) if normalise else s for s in raw]
    torch.testing.assert_close(P_N, torch.stack(by_hand).mean((0, 2)), rtol=1e-6, atol=1e-9)
    # at balance
    routers[0].common.share(0)[0].fill_(1 / 8)  # type: ignore[union-attr, operator]
    even = sum(one(x_TD).losses["pool_balance"] for one in routers)
    wanted = torch.stack([s.sum(0) > 0 for s in raw]).double().mean()  # a token that no expert wants has no shares
    assert float(even) == pytest.approx(0.25 * float(wanted if normalise else P_N.sum()), rel=1e-6)


def test_raw_scores_also_pull_sigma_down_and_shares_do_not() -> None:
    """The gradient of σ at balance: P is in proportion to it; what is divided by its sum does not know it."""
    for normalise in (False, True):
        (one,) = readers(normalise, layers=1)
        one.common.share(0)[0].fill_(1 / 8)  # type: ignore[union-attr, operator]
        loss = one(torch.randn(40, 6, dtype=torch.float64)).losses["pool_balance"]
        (slope,) = torch.autograd.grad(loss, [one.scale])
        assert float(slope) == pytest.approx(0.0 if normalise else float(loss.detach()), abs=1e-7)


def test_the_sum_of_raw_scores_grows_with_the_pool() -> None:
    """Σ_i P_i = σ · c0 · N · φ(0) / E‖u‖ at the start, about 0.4 · c0 · √N: what the loss is at balance, over its coefficient."""
    torch.manual_seed(4)
    for experts, active, planned in ((96, 1, 15.7), (128, 8, 9.2), (16, 2, 3.1)):
        sums = [
            alone(64, experts, active)(torch.randn(500, 64, dtype=torch.float64)).scores_TN.sum(1).mean()
            for _ in range(4)
        ]  # type: ignore[union-attr]
        assert float(sum(sums)) / 4 == pytest.approx(planned, rel=0.03)


def test_pools_are_balanced_each_by_itself() -> None:
    shape = mue.MoE.parse("6e2a2p", width=32, expert=16, layers=4, head_dim=16, sequence=32, router="unipool")
    torch.manual_seed(0)
    model = LanguageModel(shape)
    tokens = torch.randint(256, (2, 32))
    loads = [r.stats["load"].double() for r in model(tokens).routings]
    model.end_step_(0.0)
    state = model.state_dict()
    for pool in range(2):
        mine = torch.stack(loads[2 * pool : 2 * pool + 2])
        found = state[f"common.unipool.share_{pool}"]
        torch.testing.assert_close(found.double(), mine.sum(0) / mine.sum(), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(state["common.unipool.share_0"], state["common.unipool.share_1"])
    assert not any(block.moe.router.load.any() for block in model.blocks)
    model.eval()
    model(tokens)
    assert not any(block.moe.router.load.any() for block in model.blocks)  # a validation counts nothing


# ---- a plan --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notation", ["96e1a", "16e2a1s", "32e4a"])
def test_the_branch_is_as_large_as_the_dense_one_at_the_start(notation: str) -> None:
    """R = k/m1, σ_down ∝ 1/√m2: each branch's size against the base's, within a tenth; with R = k it is not (negative control)."""
    base = mue.Dense(width=64, ffn=64, layers=2, head_dim=16, sequence=32)
    target = mue.MoE.parse(notation, width=64, expert=32, layers=2, head_dim=16, sequence=32, router="unipool")
    plan = mue.transfer(base, target, mue.HParams(lr=8e-3, weight_decay=0.1, init_std=0.1))
    k = target.active
    m1, m2 = norm_moments(k, target.experts)
    assert plan.route_scale == pytest.approx(k / m1)
    x = torch.randn(512, 64)

    def size(plan: mue.Plan, wrong: float = 1.0) -> float:
        model = LanguageModel(plan.target, plan.multipliers)
        plan.init_(model, seed=1)
        total = 0.0
        for block in model.blocks:
            if block.moe is None:
                total += float(block.ffn(x).square().mean())  # type: ignore[operator]
            else:
                block.moe.router.route_scale *= wrong  # type: ignore[operator]
                total += float(block.moe(x)[0].square().mean())  # type: ignore[operator]
        return total**0.5

    with torch.no_grad():
        # ρ_e: the branch of more active width is larger by √ρ_e · A, which the plan keeps at the dense size
        dense = size(mue.transfer(base, base, plan.tuned))
        assert size(plan) == pytest.approx(dense, rel=0.1)
        assert size(plan, wrong=2.0) != pytest.approx(dense, rel=0.1)
    if not target.shared_experts:
        assert plan.roles["expert_down"].factor.init_std == pytest.approx(m1 * (0.5 / m2) ** 0.5)
