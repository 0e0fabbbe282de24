"""The native backend: its engines, its threads, shared experts in the same call, mixed types, strided inputs, refusals."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mue.kernels import build, library, norm
from mue.moe import ExpertWeights, MoELayer, Router, Routing, experts
from mue.moe.backends import native
from mue.moe.experts import choose
from support.expert_cases import assert_close, make_routing, make_weights, run
from support.paths import ROOT
from support.precision import close, norm_off

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler: the native kernel cannot be built")


def test_without_a_library_portable_takes_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MUE_CACHE", str(tmp_path))
    library.forget()
    try:
        layer, x = MoELayer(8, Router(8, 4, 2), 8), torch.randn(5, 8)
        y = layer(x)[0]
        assert norm.rms_norm(x, torch.ones(8), 1e-6) is None
        layer.backend = "native"
        with pytest.raises(ValueError, match="mue doctor --build"):
            layer(x)
        layer.backend = "portable"
        assert close(layer(x)[0], y, operations=3 * 8)
        assert not close(1.01 * layer(x)[0], y, operations=3 * 8)  # negative control
    finally:
        library.forget()


@contextlib.contextmanager
def engine_of(name: str) -> Iterator[list[str]]:
    """The named engine in the place of this processor's best; who asked for it is in the list."""
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "engine", lambda: asked.append(name) or name)
        yield asked


@pytest.mark.parametrize("engine", [*build.ENGINES, "tile model"])
def test_every_engine_is_as_exact_as_a_loop_of_bf16_products(engine: str, kernel: Path) -> None:
    """On all that this processor has, and the matrix unit's code with the unit played by plain loops; also at widths that it lacks.

    How large few errors are is a draw: those of tensors with less than a thousand numbers are bounded together, over all examples.
    """
    loaded = library.loaded()
    assert loaded is not None
    if engine not in [*library.offered(loaded), "tile model"]:
        pytest.skip(f"this processor has no {engine}")
    few, few_allowed = [0.0], [0.0]  # squares

    @settings(max_examples=70, deadline=None, derandomize=True)
    @given(
        kind=st.sampled_from(["topk", "ragged", "choice", "one"]), tokens=st.integers(40, 130), number=st.integers(1, 9),
        width=st.integers(1, 4), inner=st.integers(1, 4), shared=st.sampled_from([0, 32, 64]), gated=st.booleans(),
        threads=st.integers(1, 3), block=st.sampled_from([32, 32, 32, 24]),
    )  # fmt: skip
    def examples(
        kind: str, tokens: int, number: int, width: int, inner: int, shared: int, gated: bool, threads: int, block: int
    ) -> None:
        for mine, theirs, true in in_bf16(
            engine, kind, tokens, number, block * width, block * inner, shared, gated, threads
        ):
            if true.norm() > 0:
                error, allowed = norm_off(mine, true), norm_off(theirs, true)
                assert error > 1e-4  # negative control: it rounds
                if true.numel() >= 1000:
                    assert error <= 1.2 * allowed, (error, allowed)
                else:
                    few[0], few_allowed[0] = few[0] + error**2, few_allowed[0] + allowed**2

    examples()
    assert 0 < few[0] <= 1.2**2 * few_allowed[0], (few, few_allowed)


def in_bf16(
    engine: str, kind: str, tokens: int, number: int, width: int, inner: int, shared: int, gated: bool, threads: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The result and each gradient: by the engine, by a loop of bf16 products, and in float64."""
    slots = min(2, number)
    torch.manual_seed(tokens)
    routing = make_routing(kind, tokens, number, slots, torch.float32)
    routed = make_weights(number, width, inner, torch.float32, gated)
    shapes = [(shared, width), (shared, width), (width, shared)] if shared else []
    more: list[Tensor | None] = [torch.randn(s).div_(s[-1] ** 0.5).requires_grad_() for s in shapes]
    if shared and not gated:
        more[0] = None
    weights = [*routed, *more]
    x_TD, dy_TD = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    leaves = [None if w is None else w.detach().double().requires_grad_() for w in weights]
    double = replace(routing, weight_P=routing.weight_P.detach().double().requires_grad_())
    exact_y, exact = run("reference", x_TD.detach().double().requires_grad_(), double, leaves, dy_TD.double())
    with engine_of(engine) as asked, torch.autocast("cpu", dtype=torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_WORK_PER_THREAD", 1)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        y, ours = run("native", x_TD, routing, weights, dy_TD)
        y_loop, loop = run("reference", x_TD, routing, weights, dy_TD)
    assert bool(asked) == (width % 32 == inner % 32 == 0)  # blocks of 32; else the plain engine
    return list(zip([y, *ours], [y_loop, *loop], [exact_y, *exact], strict=True))


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("kind", ["topk", "one"])
def test_any_number_of_threads(kernel: Path, monkeypatch: pytest.MonkeyPatch, threads: int, kind: str) -> None:
    """Experts across a border between threads: their gradients are summed from parts, in the weights' own type."""
    monkeypatch.setattr(native, "_WORK_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(1)
    routing = make_routing(kind, 120, 5, 2, torch.float32)
    x_TD, dy_TD = torch.randn(120, 24, requires_grad=True), torch.randn(120, 24)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10), (torch.bfloat16, 2e-2)):
        weights = make_weights(5, 24, 40, dtype)
        x, dy = x_TD.detach().to(dtype).requires_grad_(), dy_TD.to(dtype)
        y, ours = run("native", x, routing, weights, dy)
        y_again, again = run("native", x, routing, weights, dy)
        y_reference, reference = run("reference", x, routing, weights, dy)
        # One call like the next: what a resumed run's metrics being the same to the bit rests on.
        assert torch.equal(y, y_again) and all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        for mine, theirs in zip([y, *ours], [y_reference, *reference], strict=True):
            assert_close(mine, theirs, tolerance)


def test_shared_experts_in_the_same_call(kernel: Path) -> None:
    """Gradients of shared and routed weights together, with and without a gate, and of the shared ones alone."""
    torch.manual_seed(2)
    routing, routed = make_routing("ragged", 50, 4, 2), make_weights(4, 20, 12, torch.float64)
    x_TD = torch.randn(50, 20, dtype=torch.float64, requires_grad=True)
    dy_TD = torch.randn(50, 20, dtype=torch.float64)
    shared = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((33, 20), (33, 20), (20, 33))]
    for gated in (True, False):
        weights = [*routed, *shared] if gated else [None, *routed[1:], None, *shared[1:]]
        ours, theirs = (run(backend, x_TD, routing, weights, dy_TD) for backend in ("native", "reference"))
        for mine, their in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
            assert_close(mine, their, 1e-10)
    alone = ExpertWeights(None, None, None, *shared)
    y = [experts(x_TD, Routing.empty(50), alone, backend=backend) for backend in ("native", "reference")]
    gradients = [torch.autograd.grad(one, [x_TD, *shared], dy_TD) for one in y]
    for mine, their in zip([y[0], *gradients[0]], [y[1], *gradients[1]], strict=True):
        assert_close(mine, their, 1e-10)


def test_mixed_types_keep_their_own(kernel: Path) -> None:
    """Under autocast float32 weights are read as they are and get float32 gradients; x of bf16 gets one of bf16."""
    torch.manual_seed(3)
    routing, weights = make_routing("topk", 40, 4, 2, torch.float32), make_weights(4, 16, 24, torch.float32)
    x_TD = torch.randn(40, 16).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = experts(x_TD, routing, ExpertWeights(*weights), backend="native")
    torch.autograd.backward(y_TD.float().sum())
    assert y_TD.dtype == x_TD.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert all(w is not None and w.grad is not None and w.grad.dtype == torch.float32 for w in weights)
    half = experts(x_TD.half(), routing, ExpertWeights(*(w.detach().half() for w in weights if w is not None)))
    assert half.dtype == torch.float16  # "auto" takes portable
    with pytest.raises(ValueError, match="float16"):
        experts(x_TD.half(), routing, ExpertWeights(*weights), backend="native")


def test_strided_and_broadcast_inputs(kernel: Path) -> None:
    """Pointers are handed over: views, transposed weights and expanded gradients must be what they look like."""
    torch.manual_seed(4)
    routing, weights = make_routing("topk", 30, 4, 2), make_weights(4, 10, 6, torch.float64)
    x_TD = torch.randn(10, 30, dtype=torch.float64).t().requires_grad_()
    turned = [None if w is None else w.detach().transpose(1, 2).contiguous().transpose(1, 2) for w in weights]
    expected = experts(x_TD, routing, ExpertWeights(*weights), backend="reference")
    got = experts(x_TD, routing, ExpertWeights(*turned), backend="native")
    assert_close(got, expected, 1e-12)
    (ours,) = torch.autograd.grad(got.sum(), x_TD)  # the gradient of a sum is an expanded scalar
    (theirs,) = torch.autograd.grad(expected.sum(), x_TD)
    assert_close(ours, theirs, 1e-12)


def test_bad_tokens_are_refused_before_memory_is_touched(kernel: Path) -> None:
    weights, x_TD = make_weights(3, 4, 5, torch.float32), torch.randn(6, 4)
    for bad in (6, -1, 1 << 40):
        token_P = torch.tensor([0, bad])
        routing = Routing(token_P, torch.tensor([0, 1]), torch.ones(2), 6, 3, slots=0)
        with pytest.raises(ValueError, match="6 tokens"):
            experts(x_TD, routing, ExpertWeights(*weights), backend="native")


def test_auto_takes_the_faster_of_ours(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel in every cell that was measured; but in bf16 without instructions of its own, where torch has them, only small matrices."""
    rows = json.loads((ROOT / "docs/results/moe_layer.json").read_text())["rows"]
    cells = {(row["shape"], row["dtype"], row["routing"], row["impl"]): row["ratio"] for row in rows}
    for (*place, name), ratio in cells.items():
        if name == "mue-native":
            assert ratio < cells[*place, "mue-portable"]
    x = torch.zeros(1, 256)
    for width, inner, engine, instructions, expected in (
        (256, 256, "dot products", True, "native"),
        (256, 256, "plain", True, "portable"),
        (256, 256, "plain", False, "native"),
        (128, 128, "plain", True, "native"),
        (250, 256, "matrix unit", True, "portable"),  # no blocks of 32
    ):
        monkeypatch.setattr(library, "engine", lambda engine=engine: engine)
        monkeypatch.setattr(library, "bf16_instructions", lambda instructions=instructions: instructions)
        weights = ExpertWeights(*make_weights(2, width, inner, torch.float32))
        assert choose(x, weights, torch.bfloat16) == expected
        assert choose(x, weights, torch.float32) == "native"


def test_the_engine_that_was_taken_has_a_reason(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best that the processor has, the system gives and the trial passed; each better one is named with what it lacks."""
    loaded = library.loaded()
    assert loaded is not None
    for unit, dot, passed, taken, reasons in (
        (library._GIVEN, True, build.ENGINES, "matrix unit", ["bf16 attention and dense feed-forward networks are torch's"]),
        (library._REFUSED, True, build.ENGINES, "dot products", ["no matrix unit: the system refused"]),
        (library._GIVEN, True, build.ENGINES[:2], "dot products", ["no matrix unit: failed its trial"]),
        (library._NO_UNIT, False, build.ENGINES, "plain", ["no dot products: this processor", "no matrix unit: this processor"]),
    ):  # fmt: skip
        given = SimpleNamespace(mue_matrix_unit=lambda unit=unit: unit, mue_has_dot=lambda dot=dot: dot)
        monkeypatch.setattr(library, "loaded", lambda given=given: given)
        monkeypatch.setattr(build, "engines", lambda _, passed=passed: list(passed))
        monkeypatch.setattr(library, "bf16_instructions", lambda dot=dot: dot)
        library.engine.cache_clear()
        try:
            assert library.engine() == taken
            words = library.why_engine().split("; ")
        finally:
            library.engine.cache_clear()
        assert len(words) == 1 + len(reasons) and all(w.startswith(r) for w, r in zip(words[1:], reasons, strict=True))
