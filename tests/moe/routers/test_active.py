"""mue.moe.routers.base.BaseRouter.set_active: a trained router evaluated with another number of active experts."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mue.moe import MoELayer, Router
from mue.moe.routers.base import ROUTER_CLASSES, SCALES, active_experts


def made(active: int, *, score: str = "softmax", normalize: bool = True, groups: int = 1) -> Router:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        router = Router(
            6, 12, active, groups, score=score, normalize=normalize,  # type: ignore[arg-type]
            gates="unit-sum" if normalize else "measured", route_scale=float(active),
        )  # fmt: skip
    nn.init.normal_(router.weight)
    return router.eval()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    trained=st.integers(1, 12),
    used=st.integers(1, 12),
    scale=st.sampled_from(sorted(SCALES)),
    score=st.sampled_from(["sigmoid", "softmax"]),
    normalize=st.booleans(),
)
def test_the_best_are_used_in_proportion_to_their_scores(
    seed: int, trained: int, used: int, scale: str, score: str, normalize: bool
) -> None:
    """Against float64: the k′ best, in proportion to their scores, with the sum that the trained k has times (k′/k)^power."""
    torch.manual_seed(seed)
    router = made(trained, score=score, normalize=normalize)
    x_TD = torch.randn(20, 6)
    router.set_active(used, scale)
    routing = router(x_TD)
    logit_TN = x_TD.double() @ router.weight.double().T
    score_TN = logit_TN.sigmoid() if score == "sigmoid" else logit_TN.softmax(1)
    best_TN = score_TN.sort(1, descending=True)
    assert torch.equal(routing.expert_P.view(20, used), best_TN.indices[:, :used])
    sums_T1 = 1.0 if normalize else best_TN.values[:, :trained].sum(1, keepdim=True)
    power = {"mean": 0.0, "root": 0.5, "sum": 1.0}[scale]
    picked_TK = best_TN.values[:, :used]
    expected = picked_TK / picked_TK.sum(1, keepdim=True) * sums_T1 * trained * (used / trained) ** power
    torch.testing.assert_close(routing.weight_P.view(20, used).double(), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_trained_number_is_the_router_as_it_is(normalize: bool) -> None:
    """To the bit, by every scale; another number is another output (the control)."""
    router = made(3, normalize=normalize)
    x_TD = torch.randn(20, 6)
    plain = router(x_TD)
    for scale in SCALES:
        router.set_active(3, scale)
        again = router(x_TD)
        assert torch.equal(again.expert_P, plain.expert_P) and torch.equal(again.weight_P, plain.weight_P)
        router.set_active(4, scale)
        assert router(x_TD).slots == 4
    router.set_active(None)
    assert torch.equal(router(x_TD).weight_P, plain.weight_P)


def test_training_is_left_as_it_is() -> None:
    router = made(3)
    router.set_active(5)
    assert router(torch.randn(4, 6)).slots == 5 and router.train()(torch.randn(4, 6)).slots == 3
    assert router.load.sum() == 12


def test_the_mean_of_equal_experts_does_not_depend_on_their_number() -> None:
    """Equal experts: the layer's output stays under "mean", and is (k′/k) and √(k′/k) times as large under the two others."""
    torch.manual_seed(0)
    layer = MoELayer(6, made(2), 8).eval()
    with torch.no_grad():
        for matrix in (layer.experts_gate, layer.experts_up, layer.experts_down):
            assert matrix is not None
            matrix.copy_(matrix[:1].clone().expand_as(matrix))
    x = torch.randn(5, 6)
    trained = layer(x)[0]
    for scale, factor in (("mean", 1.0), ("root", 2.0), ("sum", 4.0)):
        with active_experts(layer, 8, scale):
            torch.testing.assert_close(layer(x)[0], trained * factor)
    assert torch.equal(layer(x)[0], trained)  # as before, after the context


def test_refusals_leave_every_router_as_it_was() -> None:
    layer = MoELayer(6, made(2, groups=2), 8).eval()
    for active, scale, message in (
        (13, "mean", "active=13 exceeds experts=12"),
        (0, "mean", "active"),
        (3, "mean", "groups=2 does not divide active=3"),
        (4, "rooot", "scale='rooot' is unknown; did you mean 'root'"),
    ):
        with pytest.raises(ValueError, match=message), active_experts(layer, active, scale):
            pass
        assert layer(torch.randn(3, 6))[1].slots == 2
    mixed = nn.Sequential(made(2), ROUTER_CLASSES["hash"](6, 12, 2))
    with pytest.raises(ValueError, match="hash router cannot be evaluated"), active_experts(mixed, 3):
        pass
    assert mixed[0](torch.randn(3, 6)).slots == 2
    with pytest.raises(ValueError, match="no router"), active_experts(nn.Linear(2, 2), 3):
        pass
