"""mue.shapes.routers: what numbers know of a router, and that they need no torch for the standard ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mue
from mue.shapes import ROUTERS, Block, RouterKind

WITHOUT_MATRIX = ("hash", "random", "thor")


def block(router: str, **numbers: object) -> Block:
    return Block(**{"layers": 1, "experts": 8, "active": 1, "expert": 16, "router": router, **numbers})  # type: ignore[arg-type]


def test_the_table_names_the_routers_in_order() -> None:
    assert tuple(ROUTERS)[:2] == ("sigmoid", "softmax")
    assert tuple(name for name in ROUTERS if name in WITHOUT_MATRIX) == WITHOUT_MATRIX
    assert all(ROUTERS[name].name == name for name in ROUTERS)


def test_scores_need_no_torch_and_another_name_finds_its_file() -> None:
    code = (
        "import sys, mue; from mue.shapes import Block\n"
        "for r in ('sigmoid', 'softmax'): Block(layers=1, experts=4, active=2, expert=8, router=r)\n"
        "print('torch' in sys.modules)\n"
        "Block(layers=1, experts=4, active=2, expert=8, router='hash'); print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "True"]


def test_facts_that_no_check_could_compare_are_refused() -> None:
    with pytest.raises(ValueError, match="score must be one of"):
        RouterKind(name="mine", score="tanh")
    assert RouterKind(name="mine", even=True).sums_to_one(normalize=False, settings={})
    # the control: without it ``normalize`` decides
    assert not RouterKind(name="mine").sums_to_one(normalize=False, settings={})
    with pytest.raises(ValueError, match="unit_sum = 'evenly' is none of its settings"):
        RouterKind(name="mine", unit_sum="evenly")


def test_an_unknown_router_is_refused_with_the_nearest_name() -> None:
    for wrong, right in (("sigmoyd", "sigmoid"), ("hsah", "hash"), ("softmaxx", "softmax")):
        with pytest.raises(ValueError, match=f"unknown router '{wrong}'; did you mean '{right}'"):
            block(wrong)
        with pytest.raises(ValueError, match=f"did you mean '{right}'"):
            mue.MoE.parse("8e2a", width=64, expert=16, layers=1, router=wrong)


def test_what_a_router_cannot_be_is_refused() -> None:
    for router, numbers, message in (
        ("thor", {"active": 2}, "thor router uses 1 of the experts per token, got 2 active"),
        ("softmax", {"normalize": False}, "a softmax over all experts that is not renormalised"),
        ("sigmoid", {"normalize": False}, "gates that do not sum to one"),
        *((router, {"normalize": False}, f"the {router} router has nothing to normalise") for router in WITHOUT_MATRIX),
    ):
        with pytest.raises(ValueError, match=message):
            block(router, **numbers)
    with pytest.raises(ValueError, match="thor router knows no groups"):
        RouterKind(name="thor", active=1, grouped=False).check(1, 8, 2, True, {})
    for router in ROUTERS:  # the control: one expert per token is what every router can
        assert block(router).router_kind is ROUTERS[router]


@pytest.mark.parametrize("router", ["sigmoid", *WITHOUT_MATRIX])
def test_only_routers_with_a_matrix_count_one(router: str) -> None:
    """Counts, parameters and plans; everything else is the same, R = a included."""
    active = 1 if router == "thor" else 4
    notation, numbers = f"8e{active}a1s", {"width": 64, "expert": 16, "layers": 3}
    scored, shape = (mue.MoE.parse(notation, router=r, **numbers) for r in ("sigmoid", router))
    matrix = router == "sigmoid"
    counts = shape.counts()
    assert ("router" in counts, "router_bias" in counts) == (matrix, matrix)
    assert {k: v for k, v in scored.counts().items() if not k.startswith("router")} == {
        k: v for k, v in counts.items() if not k.startswith("router")
    }
    assert scored.parameters - shape.parameters == (0 if matrix else 3 * 64 * 8)
    assert scored.active_parameters - shape.active_parameters == (0 if matrix else 3 * 64 * 8)
    plans = [
        mue.transfer(mue.Dense(64, 64, 3), s, mue.HParams(lr=0.01, weight_decay=0.1, init_std=0.1))
        for s in (scored, shape)
    ]
    assert plans[1].multipliers == plans[0].multipliers and plans[1].multipliers.route == (float(active),) * 3
    assert plans[1].roles["router"].count == (3 if matrix else 0)
    assert plans[1].roles["expert_down"].values == plans[0].roles["expert_down"].values
    assert (plans[0].hash == plans[1].hash) == matrix
    assert any("no gradient from the task" in note for note in plans[1].notes) == (active == 1 and matrix)
