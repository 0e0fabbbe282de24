"""What a role says about its parameter holds on a model that is built, and the names are those of shapes and rules."""

from __future__ import annotations

import pytest

import mue
from mue.lab.models.language import LanguageModel
from mue.layouts.of_model import placed
from mue.rules.roles import ROLES, of_kind, of_part, roles_of
from mue.shapes import Transformer

# No two sizes alike, so that a fan-in says what it is.
NUMBERS = {"width": 64, "layers": 2, "head_dim": 16, "heads": 6, "vocab": 80}
SHAPES = [
    mue.Dense(ffn=72, **NUMBERS),
    mue.Dense(ffn=72, **{**NUMBERS, "tied": True, "gated": False}),
    mue.MoE.parse("8e2a1s", expert=40, shared=56, **NUMBERS),
    mue.MoE.parse("2s", expert=40, **NUMBERS),
    mue.MoE.parse("4e2a", expert=40, router="hash", **NUMBERS),
    mue.Mixed(
        64,
        (mue.Block(layers=1, ffn=72), mue.Block(layers=2, experts=4, active=2, expert=40)),
        head_dim=16,
        heads=6,
        vocab=80,
    ),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_a_roles_fans_are_those_of_a_model(shape: Transformer) -> None:
    params = placed(LanguageModel(shape))
    for p in params:
        role = ROLES[p.role]
        assert role.drawn == (p.parameter.dim() > 1), p.name
        assert role.inside == (p.layer is not None), p.name
        if role.drawn:
            assert role.reads_residual == (p.fan_in == shape.width), p.name
            assert (role.writes_residual or p.role == "embedding") == (p.fan_out == shape.width), p.name
    seen = {p.role for p in params}
    assert seen == {r for r, n in shape.counts().items() if n and ROLES[r].trained}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_a_shape_counts_what_a_role_says(shape: Transformer) -> None:
    for t in shape.tensors():
        assert (t.matrix, t.trained) == (ROLES[t.role].drawn, ROLES[t.role].trained), t.role


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_a_block_holds_the_roles_that_the_shape_counts(shape: Transformer) -> None:
    counted = {role for role, many in shape.counts().items() if many}
    held = {name for name, role in roles_of(shape).items() if any(role.present(block) for block in shape.blocks)}
    gates = set() if shape.gated else {name for name, role in ROLES.items() if role.part == "gate"}
    assert counted == held - gates - {"bias"} - ({"head"} if shape.tied else set())


def test_the_roles_that_are_no_matrix() -> None:
    vectors = {name: role.start for name, role in ROLES.items() if role.vector}
    assert vectors == {"norm": 1, "qk_norm": 1, "final_norm": 1, "bias": 0}
    assert {name for name, role in ROLES.items() if role.gain} == {"norm", "qk_norm", "final_norm"}
    assert {name for name, role in ROLES.items() if not role.trained} == {"router_bias"}
    assert {name for name, role in ROLES.items() if not role.decays} == {*vectors, "router_bias"}
    outside = {name for name, role in ROLES.items() if role.drawn and not role.hidden}
    assert {name for name in outside if ROLES[name].task is None} == {"embedding", "head"}
    assert {name for name, role in ROLES.items() if role.zero} == {"modulation", "final_modulation"}


def test_a_dense_base_speaks_for_the_experts() -> None:
    for kind in ("expert", "shared"):
        for name in of_kind(kind):
            assert ROLES[name].tuned_as == (name, f"ffn_{ROLES[name].part}")
    assert all(role.tuned_as == (name,) for name, role in ROLES.items() if role.kind not in ("expert", "shared"))


def test_kinds_and_parts_are_in_order_and_an_unknown_one_has_no_roles() -> None:
    assert of_kind("attention") == ("attention_q", "attention_k", "attention_v", "attention_o")
    assert of_kind("ffn", "embedding") == ("embedding", "ffn_up", "ffn_gate", "ffn_down")
    assert of_part("down", "o") == ("attention_o", "ffn_down", "expert_down", "shared_down")
    assert of_kind("feed-forward") == of_part("feed-forward") == ()
