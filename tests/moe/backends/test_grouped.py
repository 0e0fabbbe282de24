"""The grouped_mm backend's own steps, on torch's CPU version of its product."""

from __future__ import annotations

import pytest
import torch

from mue.moe import ExpertWeights, experts
from support.expert_cases import assert_close, make_routing, make_weights, run


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
