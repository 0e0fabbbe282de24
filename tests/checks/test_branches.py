"""The multipliers of a model's branches, measured."""

from __future__ import annotations

import pytest

from support.wiring.case import case


def test_multipliers_are_measured_to_many_digits() -> None:
    from mue.checks.context import Context

    c = case("mue hybrid")
    parts = Context(c.model, c.plan, c.batch).parts
    A, R, residual = c.plan.output_multiplier, c.plan.route_scale, c.plan.residual_multiplier
    assert len(parts) == c.plan.target.layers
    for found in parts.values():
        assert found is not None and found.activation.name == "silu" and not found.activation.swapped
        assert found.routed.sum(1).tolist() == pytest.approx([A * R * residual] * found.routed.shape[0], rel=1e-4)
        assert found.single.tolist() == pytest.approx([A * residual] * found.routed.shape[0], rel=1e-4)
        assert found.active.sum(1).tolist() == [4] * found.routed.shape[0]
