"""One block: the notation of experts, and what it may not be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mue
from mue.shapes import parse_notation


@given(
    a=st.integers(1, 8),
    k=st.integers(1, 16),
    g=st.integers(1, 4),
    s=st.integers(0, 3),
    order=st.permutations([0, 1, 2, 3]),
)
def test_notation_round_trip(a: int, k: int, g: int, s: int, order: list[int]) -> None:
    numbers = {"experts": a * g * k, "active": a * g, "groups": g, "shared_experts": s}
    moe = mue.MoE(width=64, expert=8, layers=1, **numbers)
    written = {k: v for k, v in numbers.items() if v and not (k == "groups" and v == 1)}
    assert parse_notation(moe.notation) == written
    assert mue.MoE.parse(moe.notation, width=64, expert=8, layers=1) == moe
    parts = [f"{v}{k[0] if k != 'shared_experts' else 's'}" for k, v in written.items()]
    shuffled = "".join(parts[i] for i in order if i < len(parts))
    assert parse_notation(shuffled) == written


def test_notation_examples() -> None:
    assert mue.MoE.parse("128e8a4g1s", width=64, expert=8, layers=1).notation == "128e8a4g1s"
    assert mue.MoE.parse("2s", width=64, expert=8, layers=1).notation == "2s"
    assert mue.MoE.parse("8e2a1s2p", width=64, expert=8, layers=4).notation == "8e2a1s2p"


def test_pools_are_read_by_equally_many_layers() -> None:
    block = mue.Block(layers=6, expert=8, experts=12, active=2, pools=3)
    assert block.readers == 2 and block.share == 2 * 2 / 12
    assert mue.Block(layers=6, expert=8, experts=12, active=2).share == 2 / 12
    with pytest.raises(ValueError, match="4 pools do not divide the 6 layers"):
        mue.Block(layers=6, expert=8, experts=12, active=2, pools=4)
    with pytest.raises(
        ValueError, match=r"7 pools of experts for 6 layers: no layer would read some of them; use at most 6"
    ):
        mue.Block(layers=6, expert=8, experts=12, active=2, pools=7)
    with pytest.raises(ValueError, match="ffn beside pools"):
        mue.Block(layers=6, ffn=8, pools=1)
    with pytest.raises(ValueError, match="pools must be a whole number"):
        mue.Block(layers=6, expert=8, experts=12, active=2, pools=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("notation", "message"),
    [
        ("", "cannot read"),
        ("8", "cannot read"),
        ("8e-2a", "cannot read"),
        ("8E2A", "cannot read"),
        ("8e2a ", "cannot read"),
        ("8e2x", "unknown suffix 'x'"),
        ("8e2a4e", "'e' appears twice"),
        ("8e0a", "0a"),
        ("8e", "needs both e"),
        ("2a", "needs both e"),
        ("4g", "needs both e"),
        ("8e2a0s", "0s"),
        ("2e4a", "4 active of 2 experts"),
        ("8e2a3g", "3 groups must divide"),
        ("8e3a2g", "2 groups must divide"),
        ("8e2a0p", "0p"),
        ("8e2a2p", "2 pools of experts for 1 layers: no layer would read some of them; use at most 1"),
        ("1s1p", "pools = 1, but there are no routed experts"),
    ],
)
def test_bad_notation(notation: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mue.MoE.parse(notation, width=64, expert=8, layers=1)


def test_a_measured_softmax_is_allowed() -> None:
    moe = mue.MoE(
        width=64,
        expert=8,
        layers=1,
        experts=8,
        active=2,
        router="softmax",
        normalize=False,
        gates="measured",
        gate_moments=(0.25, 0.04),
    )
    assert moe.blocks[0].route_scale == pytest.approx(8.0)


def test_blocks_are_dense_or_moe() -> None:
    with pytest.raises(ValueError, match="not both"):
        mue.Block(layers=1, ffn=8, experts=4, active=1, expert=8)
    with pytest.raises(ValueError, match="needs ffn"):
        mue.Block(layers=1)
    with pytest.raises(ValueError, match="blocks is empty"):
        mue.Mixed(64, ())
