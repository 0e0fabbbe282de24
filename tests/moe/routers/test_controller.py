"""mue.moe.routers.controller: p_{t+1} = p_0 + K_p e + K_i Σ e, clipped, without windup."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mue.moe.routers.controller import LOWEST, PIController


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
    found, expected = stepped(PIController(start, proportional, integral), *errors), []
    for t, error in enumerate(errors):
        expected.append(start + proportional * error + integral * sum(errors[: t + 1]))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_at_a_bound_nothing_is_wound_up() -> None:
    """A hundred steps that push against a bound are forgotten at once; summed they would hold p there for a hundred more."""
    for error, bound in ((0.1, 1.0), (-0.1, LOWEST)):
        controller = PIController(0.5, 1.0, 0.3)
        assert stepped(controller, *[error] * 100)[-1] == bound
        inside = stepped(controller, -error)[0]
        assert LOWEST < inside < 1.0 and abs(inside - bound) > 0.05
        # the control: with all errors summed it would be far beyond the bound still, and for a hundred more steps
        wound = 0.5 - error + 0.3 * 99 * error
        assert not LOWEST < wound < 1.0


def test_its_state_is_all_of_it() -> None:
    one, other = PIController(0.5, 1.0, 0.3), PIController(0.5, 1.0, 0.3)
    stepped(one, 0.02, -0.01, 0.03)
    assert stepped(other, 0.01) != stepped(one, 0.01)
    other.load_state_dict(one.state_dict())
    assert stepped(other, 0.01, 0.02) == stepped(one, 0.01, 0.02)
