"""mue.moe.routers.controller: p_{t+1} = p_0 + K_p e + K_i Σ e, clipped, without windup."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mue.moe.routers.controller import HIGHEST, LOWEST, PIController


def stepped(controller: PIController, *errors: float) -> list[float]:
    found = []
    for error in errors:
        controller.step_(torch.tensor(error, dtype=torch.float64))
        found.append(float(controller.p))
    return found


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    start=st.floats(0.3, 0.6),
    proportional=st.floats(0.0, 2.0),
    integral=st.floats(0.0, 0.5),
    errors=st.lists(st.floats(-0.01, 0.01), max_size=8),
)
def test_inside_its_bounds_it_is_the_formula(
    start: float, proportional: float, integral: float, errors: list[float]
) -> None:
    found, expected = stepped(PIController(start, proportional, integral, "p"), *errors), []
    for t, error in enumerate(errors):
        expected.append(start + proportional * error + integral * sum(errors[: t + 1]))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


@pytest.mark.parametrize(("moves", "pushes"), [("p", 100), ("tail", 1000)])
def test_at_a_bound_nothing_is_wound_up(moves: str, pushes: int) -> None:
    """Steps that push against a bound are forgotten at once; summed they would hold p there for as many more."""
    highest = HIGHEST if moves == "tail" else 1.0

    def moved(p: float) -> float:
        return -math.log1p(-p) if moves == "tail" else p

    for error, bound in ((0.1, highest), (-0.1, LOWEST)):
        controller = PIController(0.5, 1.0, 0.3, moves)
        assert stepped(controller, *[error] * pushes)[-1] == bound
        inside = stepped(controller, -error)[0]
        assert LOWEST < inside < highest and abs(moved(inside) - moved(bound)) > 0.05
        # the control: with all errors summed it would be far beyond the bound still, and for as many more steps
        wound = moved(0.5) - error + 0.3 * (pushes - 1) * error
        assert not moved(LOWEST) < wound < moved(highest)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(start=st.floats(0.3, 0.9), errors=st.lists(st.floats(-0.05, 0.05), max_size=8))
def test_the_mass_left_out_moves_in_logarithms(start: float, errors: list[float]) -> None:
    found = stepped(PIController(start, 0.3, 0.6), *errors)
    left = [-math.log(1 - start) + 0.3 * error + 0.6 * sum(errors[: t + 1]) for t, error in enumerate(errors)]
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64),
        1 - torch.exp(-torch.tensor(left, dtype=torch.float64)).clamp(max=1 - LOWEST),
    )


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_a_sharp_router_is_held_by_the_mass_left_out_and_not_by_p(sharpness: float) -> None:
    """Experts of a token with masses in a ratio of e^-sharpness each: a(p) is known, and its slope in p grows as 1/(1 - p)."""

    def swing(moves: str) -> float:
        controller = PIController(0.5, 0.1, 1.5, moves)
        tokens = torch.linspace(0.5, 1.5, 33, dtype=torch.float64) * sharpness  # of different sharpness
        seen = []
        for _ in range(400):
            left = -torch.log1p(-controller.p.clamp(max=HIGHEST))
            active = (left / tokens).clamp(1, 16).mean()  # the masses' tail e^(-sharpness·a) is what p leaves out
            controller.step_((4 - active) / 16)
            seen.append(float(active))
        return max(abs(a - 4) for a in seen[-50:])

    assert swing("tail") < 0.25
    if sharpness >= 3:
        assert swing("p") > 1  # the control: it swings


def test_its_state_is_all_of_it() -> None:
    one, other = PIController(0.5, 1.0, 0.3), PIController(0.5, 1.0, 0.3)
    stepped(one, 0.02, -0.01, 0.03)
    assert stepped(other, 0.01) != stepped(one, 0.01)
    other.load_state_dict(one.state_dict())
    assert stepped(other, 0.01, 0.02) == stepped(one, 0.01, 0.02)
