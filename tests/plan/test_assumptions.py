"""mue.plan.assumptions: what a plan says of a router is what is so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import mue
from mue.plan.assumptions import of_gates, of_tokens
from mue.shapes import ROUTERS, Block, RouterKind


@pytest.fixture
def known() -> Iterator[None]:
    """A router whose moments are known, and whose number of experts differs by token."""
    ROUTERS.register("known")(
        RouterKind(name="known", unit_sum=False, moments=lambda a, n, s: (0.5, 0.1), mean_active=lambda a, n, s: 3.5)
    )
    yield
    ROUTERS._entries.pop("known")


def block(router: str = "sigmoid", **more: object) -> Block:
    return Block(layers=1, experts=8, active=2, expert=16, router=router, **more)  # type: ignore[arg-type]


def test_what_is_exact_what_drifts_and_whose_numbers_they_are(known: None) -> None:
    assert "R = a is exact" in of_gates(block()) and "nears 2 as they sharpen" in of_gates(block())
    assert of_gates(block("hash")).endswith("all are even, F = 1")
    measured = of_gates(block(gates="measured", gate_moments=(0.5, 0.2)))
    assert measured.startswith("m1 = 0.5, m2 = 0.2 at init (measured), F = 1.6; R = a/m1 holds at init, and both drift")
    assert "R = a is exact" in of_gates(block(gates="measured", gate_moments=(1.0, 0.6)))
    assert "(the router's own formula), F = 0.8; R = a/m1 holds at init, and both drift" in of_gates(block("known"))
    assert of_tokens(block("known")).startswith("a token has 3.5 experts at init on average (a = 2 is planned for)")
    assert of_tokens(block()).startswith("each expert is taken to see 0.25 of the tokens")


def test_known_moments_are_the_plan_s(known: None) -> None:
    shape = mue.MoE.parse("8e2a", width=32, expert=32, layers=2, head_dim=16, router="known")
    plan = mue.transfer(mue.Dense(32, 32, 2, head_dim=16), shape, mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1))
    assert plan.route_scale == 4.0 and "F = 0.8" in str(plan) and "3.5 experts" in str(plan)
    said = mue.transfer(
        mue.Dense(32, 32, 2, head_dim=16),
        mue.MoE(
            **{**vars(shape), "router": "softmax", "normalize": False, "gates": "measured", "gate_moments": (0.5, 0.2)}
        ),
        mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1),
    )  # the control: other moments, other values
    assert said.roles["expert_down"].values != plan.roles["expert_down"].values
