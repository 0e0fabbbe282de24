"""mue.moe.experts: every backend against the plain loop, gradients, edge cases, determinism."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mue.moe import ExpertWeights, MoELayer, Routing, experts
from mue.moe import losses as moe_losses
from support.expert_cases import EXACT, FAST, assert_close, make_routing, make_weights, run

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["topk", "ragged", "choice", "one"]),
    tokens=st.integers(0, 40),
    number=st.integers(1, 24),
    slots=st.integers(1, 6),
    width=st.integers(1, 20),
    inner=st.integers(1, 20),
    gated=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_backends_agree_with_the_reference(
    backend: str, seed: int, kind: str, tokens: int, number: int, slots: int, width: int, inner: int, gated: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    routing = make_routing(kind, tokens, number, min(slots, number), dtype)
    weights = make_weights(number, width, inner, dtype, gated)
    x_TD = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    dy_TD = torch.randn(tokens, width, dtype=dtype)
    y, gradients = run(backend, x_TD, routing, weights, dy_TD)
    y_reference, reference = run("reference", x_TD, routing, weights, dy_TD)
    assert_close(y, y_reference, TOLERANCE[dtype])
    for ours, theirs in zip(gradients, reference, strict=True):
        assert_close(ours, theirs, TOLERANCE[dtype])


def test_the_comparison_sees_a_wrong_gradient() -> None:
    """Negative control of the test above: one entry off by 1e-4 of the largest fails."""
    right = torch.randn(50)
    wrong = right.clone()
    wrong[7] += 1e-4 * right.abs().max()
    with pytest.raises(AssertionError):
        assert_close(wrong, right, TOLERANCE[torch.float32])


def test_reference_is_the_formula() -> None:
    """The oracle itself, against one token and one pair at a time."""
    torch.manual_seed(0)
    routing, (gate, up, down) = make_routing("ragged", 9, 5, 3), make_weights(5, 6, 4, torch.float64)
    assert gate is not None and up is not None and down is not None
    x_TD = torch.randn(9, 6, dtype=torch.float64)
    expected = torch.zeros_like(x_TD)
    for token, expert, weight in zip(routing.token_P, routing.expert_P, routing.weight_P, strict=True):
        if expert < 5:
            x = x_TD[token]
            expected[token] += weight * (down[expert] @ (F.silu(gate[expert] @ x) * (up[expert] @ x)))
    got = experts(x_TD, routing, ExpertWeights(gate, up, down), backend="reference")
    assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ["topk", "ragged", "choice"])
@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck(backend: str, kind: str, gated: bool) -> None:
    torch.manual_seed(1)
    routing, weights = make_routing(kind, 5, 4, 2), make_weights(4, 3, 2, torch.float64, gated)
    x_TD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    leaves = [weight for weight in weights if weight is not None]

    def forward(x: Tensor, weight_P: Tensor, *rest: Tensor) -> Tensor:
        again = Routing(routing.token_P, routing.expert_P, weight_P, 5, 4, routing.slots)
        gate, up, down = rest if gated else (None, *rest)
        return experts(x, again, ExpertWeights(gate, up, down), backend=backend)

    assert torch.autograd.gradcheck(forward, (x_TD, routing.weight_P, *leaves))


@pytest.mark.parametrize("backend", FAST)
def test_thousand_experts_empty_ones_get_exact_zeros(backend: str) -> None:
    torch.manual_seed(2)
    routing, weights = make_routing("topk", 30, 1024, 3, torch.float32), make_weights(1024, 4, 3, torch.float32)
    x_TD, dy_TD = torch.randn(30, 4, requires_grad=True), torch.randn(30, 4)
    y, gradients = run(backend, x_TD, routing, weights, dy_TD)
    y_reference, reference = run("reference", x_TD, routing, weights, dy_TD)
    assert_close(y, y_reference, 1e-5)
    empty_N = torch.bincount(routing.expert_P, minlength=1024) == 0
    assert empty_N.any() and not empty_N.all()
    for ours, theirs in zip(gradients[2:], reference[2:], strict=True):
        assert_close(ours, theirs, 1e-5)
        assert torch.equal(ours[empty_N], torch.zeros_like(ours[empty_N]))
        assert (ours[~empty_N].abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["topk", "choice"])
def test_same_inputs_give_the_same_bits(backend: str, dtype: torch.dtype, kind: str) -> None:
    """With the same threads: promised, for the metrics of a resumed run rest on it."""
    torch.manual_seed(3)
    routing, weights = make_routing(kind, 200, 8, 2, torch.float32), make_weights(8, 32, 24, torch.float32)
    x_TD, dy_TD = torch.randn(200, 32, requires_grad=True), torch.randn(200, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        runs = [run(backend, x_TD, routing, weights, dy_TD) for _ in range(3)]
    for y, gradients in runs[1:]:
        assert torch.equal(y, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, runs[0][1], strict=True))


@pytest.mark.parametrize("backend", [*FAST, "grouped_mm"])
@pytest.mark.parametrize("kind", ["topk", "ragged", "choice", "one"])
def test_bf16_autocast_is_as_good_as_a_bf16_loop(backend: str, kind: str) -> None:
    """Error against float64 at most 1.2 times the reference's under the same autocast."""
    torch.manual_seed(4)
    routing, weights = make_routing(kind, 150, 6, 2, torch.float32), make_weights(6, 48, 40, torch.float32)
    x_TD, dy_TD = torch.randn(150, 48, requires_grad=True), torch.randn(150, 48)
    doubles = [None if w is None else w.detach().double().requires_grad_() for w in weights]
    weight_P = routing.weight_P.detach().double().requires_grad_()
    exact_routing = Routing(routing.token_P, routing.expert_P, weight_P, 150, 6, routing.slots)
    exact_y, exact = run("reference", x_TD.detach().double().requires_grad_(), exact_routing, doubles, dy_TD.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, ours = run(backend, x_TD, routing, weights, dy_TD)
        y_loop, loop = run("reference", x_TD, routing, weights, dy_TD)
    assert y.dtype == y_loop.dtype == torch.bfloat16
    for mine, theirs, true in zip([y, *ours], [y_loop, *loop], [exact_y, *exact], strict=True):
        error, allowed = (mine.double() - true).norm() / true.norm(), (theirs.double() - true).norm() / true.norm()
        assert 1e-4 < allowed < 0.05  # bf16 really ran
        assert error <= 1.2 * allowed


@pytest.mark.parametrize("backend", FAST)
def test_frozen_weights_and_input(backend: str) -> None:
    """Gradients that nobody needs are not computed, and the others do not change."""
    torch.manual_seed(5)
    routing, weights = make_routing("topk", 20, 4, 2), make_weights(4, 6, 5, torch.float64)
    x_TD, dy_TD = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    _, full = run(backend, x_TD.requires_grad_(), routing, weights, dy_TD)
    leaves = [x_TD, routing.weight_P, *(weight for weight in weights if weight is not None)]
    for kept in range(len(leaves)):
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(index == kept)
        y_TD = experts(x_TD, routing, ExpertWeights(*weights), backend=backend)
        (gradient,) = torch.autograd.grad(y_TD, leaves[kept], dy_TD)
        assert_close(gradient, full[kept], 1e-12)


@pytest.mark.parametrize("backend", EXACT)
def test_shared_experts_are_added_with_coefficient_one(backend: str) -> None:
    torch.manual_seed(6)
    routing, routed = make_routing("topk", 11, 4, 2), make_weights(4, 6, 5, torch.float64)
    gate, up, down = (torch.randn(s, dtype=torch.float64) for s in ((7, 6), (7, 6), (6, 7)))
    x_TD = torch.randn(11, 6, dtype=torch.float64)
    routed_gate, routed_up, routed_down = routed
    weights = ExpertWeights(routed_gate, routed_up, routed_down, gate, up, down)
    both = experts(x_TD, routing, weights, backend=backend)
    alone = experts(x_TD, routing, ExpertWeights(*routed), backend=backend)
    assert_close(both - alone, (F.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T, 1e-12)
    none = experts(x_TD, Routing.empty(11), ExpertWeights(None, None, None, gate, up, down), backend=backend)
    assert_close(none, both - alone, 1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_saved_bytes_stay_within_the_dense_ffn(backend: str) -> None:
    """At most 1.5 times what autograd saves for an eager dense FFN of equal active width."""
    torch.manual_seed(11)
    routing, weights = make_routing("topk", 256, 16, 4, torch.float32), make_weights(16, 32, 32, torch.float32)
    x_TD = torch.randn(256, 32, requires_grad=True)
    gate, up, down = (torch.randn(s, requires_grad=True) for s in ((128, 32), (128, 32), (32, 128)))

    def saved(forward: object, leave_out: list[Tensor | None]) -> int:
        known = {tensor.data_ptr() for tensor in leave_out if tensor is not None}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in known:
                found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert callable(forward)
            kept = forward()
        del kept
        return sum(found.values())

    ours = saved(lambda: experts(x_TD, routing, ExpertWeights(*weights), backend=backend), weights)
    dense = saved(lambda: F.linear(F.silu(F.linear(x_TD, gate)) * F.linear(x_TD, up), down), [gate, up, down])
    assert 0 < ours <= 1.5 * dense
    loop = saved(lambda: experts(x_TD, routing, ExpertWeights(*weights), backend="reference"), weights)
    assert loop > 1.5 * dense  # negative control: a layer that keeps what autograd would is seen


@pytest.mark.usefixtures("kernel")
def test_refusals_name_the_numbers() -> None:
    x_TD, routing, weights = torch.randn(6, 4), make_routing("topk", 6, 3, 2), make_weights(3, 4, 5, torch.float32)
    gate, up, down = weights
    routed = ExpertWeights(*weights)
    with pytest.raises(ValueError, match=r"unknown.*portable"):
        experts(x_TD, routing, routed, backend="fast")
    with pytest.raises(ValueError, match="6 tokens"):
        experts(x_TD[:5], routing, routed)
    with pytest.raises(ValueError, match=r"down \(3, 4, 5\)"):
        experts(x_TD, routing, ExpertWeights(gate, up, None if down is None else down.mT))
    with pytest.raises(ValueError, match="both up and down"):
        experts(x_TD, routing, ExpertWeights(gate, up))
    with pytest.raises(ValueError, match="neither"):
        experts(x_TD, routing, ExpertWeights())
    for bad, message in ((4, "reaches 4"), (-1, "negative")):
        wrong = Routing(routing.token_P, routing.expert_P.clone().fill_(bad), routing.weight_P, 6, 3, 2)
        for backend in EXACT:
            with pytest.raises(ValueError, match=message):
                experts(x_TD, wrong, routed, backend=backend)
    order = torch.randperm(12)
    shuffled = Routing(routing.token_P.flip(0), routing.expert_P[order], routing.weight_P[order], 6, 3, 2)
    for backend in FAST:
        with pytest.raises(ValueError, match="slots=0"):
            experts(x_TD, shuffled, routed, backend=backend)
    with pytest.raises(ValueError, match=r"6 \* 3"):
        Routing(routing.token_P, routing.expert_P, routing.weight_P, 6, 3, 3)
    with pytest.raises(ValueError, match="at least one expert"):
        MoELayer(8, None, expert_width=4)
    assert moe_losses.router_z_loss(torch.zeros(0, 3)).item() == 0
