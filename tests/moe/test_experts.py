"""mue.moe.experts: every backend against the plain loop, gradients, edge cases, determinism."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mue.moe import ExpertWeights, MoELayer, Router, Routing, experts
from mue.moe import losses as moe_losses
from mue.moe.backends import portable, portable_rows
from support.expert_cases import assert_close, make_routing, make_weights, run
from support.precision import close

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
FAST = ["portable", "native"]
EXACT = ["reference", *FAST]  # grouped_mm has no float64


@pytest.fixture(autouse=True)
def _kernel(request: pytest.FixtureRequest) -> None:
    """Tests of the native backend need its kernel."""
    if getattr(request.node, "callspec", None) and "native" in request.node.callspec.params.values():
        request.getfixturevalue("kernel")


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


def test_bf16_rows_come_in_buckets() -> None:
    """Every row count of a bf16 product is a multiple of 32 (each new row count costs a millisecond of set-up); one thread's float32 rows
    are not padded."""
    counts = torch.bincount(make_routing("topk", 100, 7, 2).expert_P).tolist()
    chunks, rows = portable_rows.layout(counts, 32, 1, 1, 100)
    assert [batch.rows for chunk in chunks for batch in chunk.batches] == rows
    assert all(row % 32 == 0 for row in rows)
    assert portable_rows.layout(counts, 1, 1, 1, 100)[1] == counts
    assert any(count % 32 for count in counts)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.one_of(st.integers(0, 5), st.integers(200, 230), st.integers(0, 3000)), min_size=1, max_size=70),
    parts=st.integers(1, 16),
    cost=st.sampled_from([1, 16384, 131072]),
)
def test_batches_hold_every_expert_once_and_waste_little(counts: list[int], parts: int, cost: int) -> None:
    chunks, rows = portable_rows.layout(counts, parts, parts, cost, 2048)
    batches = [batch for chunk in chunks for batch in chunk.batches]
    held = [expert for batch in batches for expert in range(batch.first, batch.first + batch.experts)]
    assert held == [expert for expert, count in enumerate(counts) if count]
    assert [row == 0 for row in rows] == [count == 0 for count in counts]
    stop = 0
    for chunk in chunks:
        assert chunk.start == stop
        for batch in chunk.batches:
            assert chunk.start + batch.start == stop
            assert batch.parts == (parts if batch.experts == 1 else 1)
            assert batch.experts == 1 or batch.experts % parts == 0  # every thread has whole products
            real = sum(counts[batch.first : batch.first + batch.experts])
            size = batch.experts * batch.parts * batch.rows
            assert real <= size <= real + max(size // portable_rows.MOST_WASTE, parts - 1)
            stop += size
        assert chunk.stop == stop
        assert stop - chunk.start <= 2048 or len(chunk.batches) == 1
    assert stop == sum(rows)


def test_nearly_equal_experts_share_a_batch() -> None:
    """Balanced loads do, skewed ones do not, and neither where the alignment rows cost more than a call."""

    def sizes(counts: list[int], cost: int) -> list[int]:
        chunks, _ = portable_rows.layout(counts, 2, 2, cost, 1 << 20)
        return [batch.experts for chunk in chunks for batch in chunk.batches]

    balanced = [500, 510, 505, 490, 520, 495, 515, 500]
    assert sizes(balanced, 128 * 128) == [8]
    assert sizes([1600, 1100, 800, 600], 128 * 128) == [1, 1, 1, 1]
    assert sizes(balanced, 4096 * 4096) == [1] * 8


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_small_chunks_and_sums_agree_with_the_reference(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """The same numerics whatever the limits and the number of threads are, also the way that large problems take."""
    torch.manual_seed(15)
    before = torch.get_num_threads()
    for large, elements in ((0, 1), (0, 300), (1 << 25, 300)):
        monkeypatch.setattr(portable, "_LARGE", large)
        monkeypatch.setattr(portable_rows, "_CHUNK_ELEMENTS", elements)
        for kind in ("topk", "ragged", "choice", "one"):
            routing, weights = make_routing(kind, 90, 12, 3), make_weights(12, 8, 10, torch.float64)
            x_TD, dy_TD = torch.randn(90, 8, dtype=torch.float64, requires_grad=True), torch.randn(90, 8).double()
            y_reference, reference = run("reference", x_TD, routing, weights, dy_TD)
            torch.set_num_threads(threads)
            try:
                results = [run("portable", x_TD, routing, weights, dy_TD) for _ in range(2)]
            finally:
                torch.set_num_threads(before)
            y, gradients = results[0]
            for ours, theirs in zip([y, *gradients], [y_reference, *reference], strict=True):
                assert_close(ours, theirs, 1e-10)
            for once, again in zip([y, *gradients], [results[1][0], *results[1][1]], strict=True):
                assert torch.equal(once, again)


def test_the_compiled_backward_has_the_forwards_layout() -> None:
    """Also where it finds another number of threads: rows saved for two parts an expert are not read as rows of five."""
    torch.manual_seed(16)
    torch._dynamo.reset()
    routing, weights = make_routing("topk", 50, 6, 2), make_weights(6, 8, 10, torch.float64)
    x_TD = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    leaves = [x_TD, routing.weight_P, *(weight for weight in weights if weight is not None)]
    before = torch.get_num_threads()

    def forward(x: Tensor) -> Tensor:
        return experts(x, routing, ExpertWeights(*weights), backend="portable").square().sum()

    expected = torch.autograd.grad(forward(x_TD), leaves)
    try:
        torch.set_num_threads(2)
        loss = torch.compile(forward, backend="aot_eager", fullgraph=True)(x_TD)
        torch.set_num_threads(5)
        found = torch.autograd.grad(loss, leaves)
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-10)


@pytest.mark.parametrize(("number", "pairs"), [(7, 100), (7, 5000), (300, 5000), (1 << 15, 5000), (255, 40_000)])
def test_sorting_is_stable(number: int, pairs: int) -> None:
    """Also where small integers are sorted in place of large ones, padding pairs last."""
    expert_P = torch.randint(0, number + 1, (pairs,))
    order_P = portable_rows.sorted_pairs(expert_P, number)
    assert torch.equal(order_P, torch.argsort(expert_P, stable=True))
    assert not torch.equal(order_P, torch.argsort(expert_P.flip(0), stable=True))  # negative control


def test_bucket_rows_do_not_spread_a_nan() -> None:
    """An alignment row repeats a token of its own expert, so a NaN stays with the experts that saw it."""
    routing = Routing.from_topk(torch.tensor([[0], [1], [1]]), torch.ones(3, 1), 2, stats=False)
    weights = make_weights(2, 8, 8, torch.float32)
    x_TD = torch.randn(3, 8)
    x_TD[0] = float("nan")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = experts(x_TD, routing, ExpertWeights(*weights), backend="portable")
    torch.autograd.backward(y_TD[1:].sum())
    assert y_TD[0].isnan().all() and y_TD[1:].isfinite().all()
    up = weights[1]
    assert up is not None and up.grad is not None and up.grad[1].isfinite().all()


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


def layer_like(shared_experts: int, shared_width: int) -> MoELayer:
    return MoELayer(6, Router(6, 4, 2), 5, shared_experts, shared_width).double()


def test_n_shared_of_width_h_are_one_of_n_times_h() -> None:
    """Property of conventions.md 12, and what the two layers hold is the same tensors' shapes."""
    torch.manual_seed(7)
    many, one = layer_like(3, 4), layer_like(1, 12)
    one.load_state_dict(many.state_dict())
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert close(many(x)[0], one(x)[0], operations=3 * 12)
    assert not close(1.01 * many(x)[0], one(x)[0], operations=3 * 12)  # negative control
    assert many.shared_up is not None and many.shared_gate is not None and many.shared_down is not None
    by_hand = torch.zeros_like(x)  # the three experts one by one
    for i in range(3):
        rows = slice(4 * i, 4 * i + 4)
        by_hand += (F.silu(x @ many.shared_gate[rows].T) * (x @ many.shared_up[rows].T)) @ many.shared_down[:, rows].T
    alone = MoELayer(6, None, 5, 3, 4).double()
    alone.load_state_dict({k: v for k, v in many.state_dict().items() if k.startswith("shared_")})
    y, routing = alone(x)
    assert_close(y, by_hand, 1e-12)
    assert routing.num_pairs == 0 and routing.num_experts == 0 and alone.router is None
    with pytest.raises(RuntimeError):  # negative control: another total width is another layer
        layer_like(2, 4).load_state_dict(many.state_dict())


@pytest.mark.parametrize("backend", EXACT)
def test_one_expert_always_on_is_the_dense_ffn(backend: str) -> None:
    torch.manual_seed(8)
    layer = MoELayer(6, Router(6, 1, 1), 9, output_multiplier=0.25, backend=backend).double()
    assert layer.experts_gate is not None and layer.experts_up is not None and layer.experts_down is not None
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    gate, up, down = layer.experts_gate[0], layer.experts_up[0], layer.experts_down[0]
    dense = 0.25 * (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert_close(layer(x)[0], dense, 1e-12)
    doubled = MoELayer(6, Router(6, 1, 1, route_scale=2.0), 9, output_multiplier=0.25, backend=backend).double()
    doubled.load_state_dict(layer.state_dict())
    assert_close(doubled(x)[0], 2 * dense, 1e-12)  # negative control: R is seen


def test_activation_checkpointing() -> None:
    torch.manual_seed(9)
    layer = MoELayer(8, Router(8, 6, 2), 5, shared_experts=1)
    x = torch.randn(30, 8, requires_grad=True)
    gradients = []
    for wrapped in (False, True, "scaled"):
        layer.zero_grad()
        x.grad = None
        y = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False) if wrapped else layer(x)[0]
        torch.autograd.backward((1.01 if wrapped == "scaled" else 1) * y.square().sum())
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    operations = 2 * (3 * 8 + 30)  # three products forward and back, and the sum over tokens
    for plain, again, scaled in zip(*gradients, strict=True):
        assert plain is not None and again is not None and scaled is not None and plain.any()
        assert close(again, plain, operations=operations)
        assert not close(scaled, plain, operations=operations)  # negative control


@pytest.mark.parametrize(("backend", "dtype"), [("native", torch.float32), ("portable", torch.bfloat16)])
def test_torch_compile_has_no_graph_break(backend: str, dtype: torch.dtype) -> None:
    """aot_eager traces forward and backward without needing a C++ compiler; another token count is no new trace."""
    torch.manual_seed(10)
    torch._dynamo.reset()
    layer = MoELayer(8, Router(8, 6, 2), 5, shared_experts=1, backend=backend)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    rounding = 1e-6 if dtype == torch.float32 else 0.02
    for tokens in (30, 17):
        x = torch.randn(tokens, 8)
        results = []
        for module in (layer, compiled):
            layer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = module(x)[0]
            torch.autograd.backward(y.float().square().sum())
            results.append([y.detach(), *(p.grad for p in layer.parameters())])
        for plain, traced in itertools.zip_longest(*results):
            assert plain is not None and traced is not None
            assert_close(traced, plain, rounding)
    with pytest.raises(Exception, match=r"(?i)graph break|data.dependent"):  # negative control
        torch.compile(MoELayer(8, Router(8, 6, 2), 5, backend="reference"), backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize("kind", ["topk", "ragged", "choice", "one"])
@pytest.mark.parametrize("gated", [True, False])
def test_grouped_mm_on_the_cpu(kind: str, gated: bool) -> None:
    """The CUDA backend's own steps (order, offsets, padding, spread and combine), on torch's CPU version of the product."""
    torch.manual_seed(12)
    routing, weights = make_routing(kind, 60, 7, 3, torch.float32), make_weights(7, 16, 24, torch.float32, gated)
    x_TD, dy_TD = torch.randn(60, 16, requires_grad=True), torch.randn(60, 16)
    y, gradients = run("grouped_mm", x_TD, routing, weights, dy_TD)
    y_reference, reference = run("reference", x_TD, routing, weights, dy_TD)
    for ours, theirs in zip([y, *gradients], [y_reference, *reference], strict=True):
        assert_close(ours, theirs, 1e-5)
    doubles = [None if weight is None else weight.double() for weight in weights]
    with pytest.raises(ValueError, match="float64"):
        experts(x_TD.double(), routing, ExpertWeights(*doubles), backend="grouped_mm")


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


def test_notation_is_shown() -> None:
    assert "16e4a2g1s" in repr(MoELayer(8, Router(8, 16, 4, 2), 4, shared_experts=1))
    assert MoELayer(8, Router(8, 16, 4), 4).notation == "16e4a"
