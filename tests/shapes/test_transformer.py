"""Shapes of transformers: counts by hand, dictionaries, one block per layer, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mue
from mue.shapes import shape_from_dict


def test_counts_by_hand() -> None:
    """A dense decoder of width 8, two heads of 4, ffn 16, vocabulary 10, two blocks; SwiGLU; untied."""
    dense = mue.Dense(width=8, ffn=16, layers=2, head_dim=4, vocab=10, sequence=32)
    block = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8 + 2 * 4
    assert dense.parameters == 10 * 8 + 2 * block + 8 + 10 * 8
    assert dense.active_parameters == dense.parameters - 10 * 8  # the embedding is a look-up
    assert replace(dense, tied=True).parameters == dense.parameters - 10 * 8
    assert replace(dense, tied=True).active_parameters == dense.active_parameters
    matrices = 2 * (4 * 64 + 3 * 128) + 80
    assert dense.flops_per_token == 6 * matrices + 12 * 2 * 8 * 32
    assert replace(dense, gated=False).parameters == dense.parameters - 2 * 8 * 16
    assert replace(dense, kv_heads=1).parameters == dense.parameters - 2 * 2 * 8 * 4
    assert dense.active_width == 16 and dense.expansion == 2


def test_moe_counts_by_hand() -> None:
    moe = mue.MoE.parse("4e2a1s", width=8, expert=6, layers=2, head_dim=4, vocab=10, shared=5)
    per_expert, shared = 3 * 8 * 6, 3 * 8 * 5
    dense = mue.Dense(width=8, ffn=6, layers=2, head_dim=4, vocab=10)
    assert moe.parameters == dense.parameters + 2 * (3 * per_expert + shared + 8 * 4)
    assert moe.active_parameters == dense.active_parameters + 2 * (per_expert + shared + 8 * 4)
    assert moe.active_width == 2 * 6 + 5
    assert moe.counts()["expert_up"] == 8 and moe.counts()["shared_up"] == 2 and moe.counts()["router_bias"] == 2
    assert moe.name == "4e2a1s d8 L2"


def test_pools_count_once() -> None:
    """12 layers with 8 experts each and one pool of 96 are of one size; of half the pool, the other 48 experts are gone."""
    own = mue.MoE.parse("8e1a", width=8, expert=6, layers=12, head_dim=4, vocab=10)
    whole, half = (mue.MoE.parse(f"{n}e1a1p", width=8, expert=6, layers=12, head_dim=4, vocab=10) for n in (96, 48))
    expert, routers = 3 * 8 * 6, 12 * 8 * 8
    assert whole.parameters - 12 * routers == own.parameters - routers
    assert half.parameters == whole.parameters - 48 * expert - 12 * 8 * 48
    assert whole.counts()["expert_up"] == own.counts()["expert_up"] == 96 and whole.counts()["router"] == 12
    assert whole.active_parameters - 12 * routers == own.active_parameters - routers
    assert half.flops_per_token == whole.flops_per_token - 6 * 12 * 8 * 48
    assert whole.pool_layers == (tuple(range(12)),) and own.pool_layers == ()
    # a pool that is smaller than what layers take of it: products count every time, parameters once
    few = mue.MoE.parse("2e1a1p", width=8, expert=6, layers=12, head_dim=4, vocab=10)
    assert few.active_parameters == few.parameters - 10 * 8
    assert few.flops_per_token == whole.flops_per_token - 6 * 12 * 8 * 94


def test_pools_of_blocks_that_differ() -> None:
    blocks = (
        mue.Block(layers=1, ffn=16),
        mue.Block(layers=4, expert=8, experts=4, active=2, pools=2),
        mue.Block(layers=1, expert=8, experts=4, active=2),
        mue.Block(layers=2, expert=4, experts=6, active=1, pools=1, normalize=False, **MEASURED_GATES),
    )
    mixed = mue.Mixed(32, blocks, head_dim=16)
    assert mixed.pool_layers == ((1, 2), (3, 4), (6, 7))
    assert mixed.counts()["expert_up"] == 2 * 4 + 4 + 6


MEASURED_GATES: dict[str, Any] = {"gates": "measured", "gate_moments": (0.5, 0.25)}


def test_mixed_blocks_add_up() -> None:
    blocks = (mue.Block(layers=1, ffn=16), mue.Block(layers=3, expert=8, experts=4, active=2))
    mixed = mue.Mixed(32, blocks, head_dim=16)
    first = mue.Dense(width=32, ffn=16, layers=4, head_dim=16)
    rest = mue.MoE.parse("4e2a", width=32, expert=8, layers=4, head_dim=16)
    assert mixed.layers == 4 and mixed.active_width == 16 and mixed.counts()["ffn_up"] == 1
    assert 4 * mixed.parameters == first.parameters + 3 * rest.parameters
    assert replace(mixed, blocks=(mue.Block(layers=1, ffn=8), blocks[1])).active_width is None


@given(
    st.sampled_from(
        [
            mue.Dense(width=64, ffn=96, layers=3, tied=True, output_multiplier=0.5),
            mue.MoE.parse("8e2a2g1s", width=64, expert=24, layers=3, kv_heads=1),
            mue.MoE.parse("8e2a2p", width=64, expert=24, layers=4),
            mue.MoE(
                width=64,
                expert=24,
                layers=3,
                experts=8,
                active=2,
                gates="measured",
                gate_moments=(0.5, 0.2),
                normalize=False,
            ),
            mue.Mixed(64, (mue.Block(layers=1, ffn=16), mue.Block(layers=2, expert=8, experts=4, active=2))),
        ]
    )
)
def test_dictionaries_round_trip(shape: Any) -> None:
    assert shape_from_dict(shape.to_dict()) == shape
    if "2p" not in shape.name:  # files of before have no such key
        assert "pools" not in json.dumps(shape.to_dict())
    assert shape_from_dict({**shape.to_dict(), "vocab": 999}) != shape
    with pytest.raises(ValueError, match="unknown kind"):
        shape_from_dict({**shape.to_dict(), "kind": "sparse"})


def test_numbers_of_numpy_make_the_same_shape() -> None:
    plain = mue.MoE.parse("8e2a1s", width=64, expert=24, layers=3, head_dim=16, output_multiplier=0.5)
    n = np.int64
    given = mue.MoE(
        width=n(64), expert=24.0, layers=n(3), experts=n(8), active=n(2), shared_experts=n(1), head_dim=16.0,
        output_multiplier=np.float32(0.5),
    )  # fmt: skip
    assert given == plain and json.dumps(given.to_dict()) == json.dumps(plain.to_dict())
    blocks = (mue.Block(layers=n(1), ffn=n(16)), mue.Block(layers=2.0, expert=n(8), experts=4, active=2))
    assert mue.Mixed(n(64), blocks).to_dict() == mue.Mixed(64, tuple(replace(b) for b in blocks)).to_dict()
    assert json.dumps(mue.Mixed(n(64), blocks).to_dict())


def test_heads_alone_imply_their_size() -> None:
    """``heads`` without ``head_dim`` divide the width among them, as everywhere in the field; with both, both hold."""
    assert mue.Dense(128, 512, 8, heads=4).head_dim == 32
    assert mue.Dense(128, 512, 8, heads=4).attention_width == 128
    assert mue.MoE.parse("4e2a", width=96, expert=8, layers=1, heads=3).head_dim == 32
    assert mue.Mixed(96, (mue.Block(layers=1, ffn=8),), heads=3).head_dim == 32
    assert mue.Dense(128, 512, 8, heads=4, head_dim=64).attention_width == 256
    assert (mue.Dense(128, 512, 8).head_dim, mue.Dense(128, 512, 8).num_heads) == (64, 2)
    assert mue.Dense(100, 512, 8, heads=3, head_dim=64).attention_width == 192


def test_a_model_that_would_fill_the_memory_is_refused() -> None:
    huge = 10**17
    for make in (
        lambda: mue.MoE.parse("4e2a", width=64, expert=8, layers=huge),
        lambda: mue.MoE.parse(f"{huge}e2a", width=64, expert=8, layers=1),
        lambda: mue.MoE.parse(f"4e2a{huge}s", width=64, expert=8, layers=1),
        lambda: mue.Mixed(64, (mue.Block(layers=99_999, ffn=8), mue.Block(layers=2, ffn=4))),
    ):
        with pytest.raises(ValueError, match="must be at most"):
            make()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"width": 0}, "width must be a whole number of at least 1"),
    ({"width": -64}, "width must be"),
    ({"width": 64.5}, "width must be"),
    ({"width": float("inf")}, "width must be"),
    ({"layers": 10**17}, "layers must be at most 100,000"),
    ({"head_dim": 0}, "head_dim must be"),
    ({"width": True}, "width must be"),
    ({"layers": 0}, "layers must be"),
    ({"ffn": 0}, "ffn must be"),
    ({"vocab": 0}, "vocab must be"),
    ({"sequence": 0}, "sequence must be"),
    ({"width": 100}, "width 100 is not divisible by head_dim 64"),
    ({"heads": 5}, "width 128 is not divisible by 5 heads"),
    ({"kv_heads": 3}, "3 kv_heads do not divide the 2 heads"),
    ({"output_multiplier": 0.0}, "output_multiplier must be greater than 0"),
    ({"output_multiplier": float("nan")}, "output_multiplier must be a finite number"),
    ({"output_multiplier": float("inf")}, "output_multiplier must be a finite number"),
    ({"gated": 1}, "gated must be true or false"),
    ({"tied": "no"}, "tied must be true or false"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_dense(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"width": 128, "ffn": 256, "layers": 2}
    mue.Dense(**good)
    with pytest.raises(ValueError, match=message):
        mue.Dense(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": "sigmod"}, "did you mean 'sigmoid'"),
        ({"gates": "none"}, "gates must be 'unit-sum' or 'measured'"),
        ({"router": "softmax", "normalize": False}, "sums to about a/N"),
        ({"normalize": False}, 'need gates = "measured"'),
        ({"gate_moments": (1, 1)}, 'only with gates = "measured"'),
        ({"gates": "measured"}, "needs gate_moments"),
        ({"gates": "measured", "gate_moments": (1.0,)}, "needs gate_moments"),
        ({"gates": "measured", "gate_moments": (1.0, 0.1)}, r"E\[Σw²\] cannot be below"),
        ({"gates": "measured", "gate_moments": (0.0, 0.1)}, "gate_moments must be greater than 0"),
        ({"shared": 8}, "there are none"),
        ({"expert": 0}, "expert must be"),
        ({"groups": 0}, "groups must be"),
        ({"experts": 0}, "experts must be"),
    ],
)
def test_bad_moe(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"width": 128, "expert": 64, "layers": 2, "experts": 8, "active": 2}
    mue.MoE(**good)
    with pytest.raises(ValueError, match=message):
        mue.MoE(**{**good, **change})


def test_every_layer_has_its_block() -> None:
    dense, moe = mue.Block(layers=2, ffn=48), mue.Block(layers=3, experts=4, active=2, expert=24)
    assert mue.Mixed(64, (dense, moe, dense)).per_layer == (dense, dense, moe, moe, moe, dense, dense)
    assert mue.Dense(64, 48, 2).per_layer == (dense, dense)


def test_other_blocks_in_the_place_of_its_own() -> None:
    dense = mue.Dense(32, 64, 2, head_dim=16, tied=True)
    assert dense.with_blocks(dense.blocks) == dense
    assert dense.with_blocks([mue.Block(layers=3, ffn=32)]) == mue.Dense(32, 32, 3, head_dim=16, tied=True)
    moe = mue.MoE.parse("8e2a2g1s", width=32, expert=16, layers=2, head_dim=16, shared=8)
    assert moe.with_blocks(moe.blocks) == moe
    other = replace(moe.blocks[0], router="softmax", expert=8)
    assert moe.with_blocks([other]) == replace(moe, router="softmax", expert=8)
    mixed = mue.Mixed(32, (*dense.blocks, *moe.blocks), head_dim=16)
    assert mixed.with_blocks([dense.blocks[0], other]) == replace(mixed, blocks=(dense.blocks[0], other))
    with pytest.raises(ValueError, match="unpack"):
        moe.with_blocks([other, other])
