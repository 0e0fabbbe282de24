"""Feed-forwards taken apart where that is hard: more experts than the width, parts of which one is swapped, axes declared wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mue
from mue.checks.record import Product
from mue.checks.solve import as_declared
from mue.lab.models.language import LanguageModel
from mue.layouts.layout import Layout, ParamInfo

BASE = mue.Dense(width=32, ffn=32, layers=1, head_dim=16, sequence=16, vocab=64)
FORWARD = ("multipliers", "gates")


def built(notation: str, **more: Any) -> tuple[mue.Plan, LanguageModel, tuple[Tensor, Tensor]]:
    target = mue.MoE.parse(notation, width=32, expert=16, layers=2, head_dim=16, sequence=16, vocab=64, **more)
    plan = mue.transfer(BASE, target, mue.HParams(lr=4e-3, weight_decay=0.1, init_std=0.05))
    model = LanguageModel(target, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(64, (2, 16))
    return plan, model, (tokens, tokens)


@pytest.mark.parametrize("notation", ["32e2a", "48e4a1s"])
def test_as_many_experts_as_the_width_are_read_off_too(notation: str) -> None:
    """Fewer equations than experts, but the router's logits say which can be active; a wrong R and raw scores are named."""
    plan, model, batch = built(notation)
    assert mue.check(model, plan, batch, only=FORWARD).ok
    model.blocks[1].moe.router.route_scale *= 2
    found = mue.check(model, plan, batch, raises=False, only=FORWARD)
    assert [f.where for f in found.failures] == ["routed sum of blocks.1.moe.experts_down"], found


def test_gates_fall_back_on_the_routers_alone() -> None:
    """A router without logits leaves too few equations for as many experts as the width: it is run alone, or that is said."""
    for router, status in (("random", "pass"), ("hash", "not measured")):
        plan, model, batch = built("48e4a", router=router)
        found = mue.check(model, plan, batch, raises=False, only=FORWARD)
        assert {f.status for f in found.findings if f.check == "gates"} == {status}, found
        missed = [f for f in found.unmeasured if f.check == "multipliers"]
        assert [f.where for f in missed] == ["blocks.0.moe.experts_down", "blocks.1.moe.experts_down"]
        assert "too few equations" in missed[0].measured


@pytest.mark.parametrize("swapped", [("shared",), ("experts",), ("shared", "experts")])
def test_swapped_gate_and_up_are_named_where_they_are(swapped: tuple[str, ...]) -> None:
    plan, model, batch = built("8e2a1s")
    other = {"_up": "_gate", "_gate": "_up"}

    def crossed(row: Layout) -> Layout:
        kind, _, part = row.pattern.rpartition("_")
        if not kind.endswith(swapped) or f"_{part}" not in other:
            return row
        return replace(row, role=row.role.removesuffix(part).rstrip("_") + other[f"_{part}"])

    rows = [crossed(row) for row in model.layout()]
    model.layout = lambda: rows  # type: ignore[method-assign]
    found = mue.check(model, plan, batch, raises=False, only=["multipliers"])
    assert sorted(f.where for f in found.failures) == sorted(
        f"blocks.{i}.moe.{kind}_up" for i in range(2) for kind in swapped
    ), found


@pytest.mark.parametrize("axes", [("out", "in"), ("in", "out")])
def test_a_square_matrix_is_compared_with_its_declaration(axes: tuple[str, str]) -> None:
    weight, x = torch.randn(8, 8), torch.randn(5, 8)
    products: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
        ("out", "in"): lambda x: x @ weight.T + 3,
        ("in", "out"): lambda x: x @ weight + 3,
    }
    for used, product in products.items():
        info = ParamInfo("down", weight, Layout("down", "ffn_down", axes), (0,))
        assert as_declared(Product(info, x, product(x))) is (used == axes)
