"""The portable backend: the same numbers whatever its limits, its threads and its rows are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mue.moe import ExpertWeights, Routing, experts
from mue.moe.backends import portable, portable_rows
from support.expert_cases import assert_close, make_routing, make_weights, run


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
