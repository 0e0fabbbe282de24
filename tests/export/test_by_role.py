"""A plan's rows by role: the plan's own values, all of the model's elements, coefficients of biases, Muon's steps."""

from __future__ import annotations

from typing import Any

import pytest

import mue
from mue.export.by_role import RoleRow, role_rows
from mue.export.rows import folded
from mue.fold import fold
from mue.plan.update_scale import matrix_shape
from mue.rules.roles import ROLES
from mue.shapes.update_scales import UPDATE_SCALES
from support.stack_values import ALL, SIZES, TARGETS, plan


def in_layers(rows: list[RoleRow]) -> dict[tuple[str, int | None], RoleRow]:
    """By role and layer; none is there twice."""
    found = [((row.role, layer), row) for row in rows for layer in row.layers or (None,)]
    assert len(dict(found)) == len(found)
    return dict(found)


@ALL
def test_rows_are_the_plans(kind: str) -> None:
    made = fold(plan(kind))
    rows = in_layers(role_rows(made))
    for (role, layer), row in rows.items():
        if role in ROLES:
            v = made.role(role, layer).values
            assert (row.lr, row.weight_decay, row.eps, row.std) == (v.lr, v.weight_decay, v.eps, v.init_std)
            assert row.constant == (None if ROLES[role].drawn else made.role(role, layer).constant)
    there = {
        (role, layer)
        for layer in range(made.target.layers)
        for role, p in made.per_layer[layer].roles.items()
        if p.count
    }
    inside = {(role, layer) for role, layer in there if ROLES[role].trained and ROLES[role].inside}
    assert inside <= set(rows) and {role for role, layer in rows if layer is None} >= {"embedding", "final_norm"}
    assert (("head", None) in rows) != made.target.tied


@ALL
def test_elements_are_all_of_the_matrices(kind: str) -> None:
    target = TARGETS[kind]
    counted = sum(
        row.elements
        for (role, _), row in in_layers(role_rows(fold(plan(kind)))).items()
        if row.elements and ROLES[role].drawn
    )
    assert counted == sum(t.many * t.size for t in target.tensors() if t.role in ROLES and ROLES[t.role].drawn)


def test_a_tied_models_last_norm_may_not_be_missing() -> None:
    """It carries the head's multiplier; other vectors are what a model has or has not."""
    for kind in ("tied", "experts"):
        row = in_layers(role_rows(fold(plan(kind))))["final_norm", None]
        assert row.elements == (TARGETS[kind].width if kind == "tied" else None) and (row.folded != 1) == (
            kind == "tied"
        )


def test_biases_go_with_their_weights() -> None:
    made = fold(plan("dense, then experts"))
    rows = in_layers(role_rows(made))
    for (role, layer), row in rows.items():
        if role.startswith("bias of "):
            assert layer is not None
            c = made.folding.coefficients[made.block_of(layer)][role.removeprefix("bias of ")]
            bias = rows["bias", layer]
            assert (row.lr, row.eps, row.folded) == (bias.lr * c, bias.eps / c, c) and row.constant == 0
    assert ("bias of ffn_down", 0) in rows and ("bias of ffn_down", 1) not in rows
    assert ("bias of attention_q", 0) not in rows  # nothing is folded there


def test_a_bias_of_a_tied_models_last_norm_is_folded_as_its_gain() -> None:
    rows = in_layers(role_rows(fold(plan("tied"))))
    gain, bias = rows["final_norm", None], rows["bias of final_norm", 0]
    assert (bias.folded, bias.constant) == (gain.folded, 0) and gain.folded != 1
    assert bias.lr == pytest.approx(rows["bias", 0].lr * gain.folded)


@pytest.mark.parametrize("scale", UPDATE_SCALES)
def test_rates_of_muon_are_those_of_an_orthogonal_step(scale: str) -> None:
    before = plan("dense, then experts")
    tuned = before.tuned.replace(optimizer="muon", adamw_lr=3e-3, update_scale=scale)
    made = fold(mue.transfer(before.inputs.base, before.target, tuned))
    moved = 0
    for (role, layer), row in in_layers(role_rows(made)).items():
        if row.muon:
            assert layer is not None
            v, shape = (
                made.role(role, layer).values,
                matrix_shape(ROLES[role], made.target, made.target.per_layer[layer]),
            )
            assert row.lr == pytest.approx(v.lr * UPDATE_SCALES[scale].factor(*shape), rel=1e-14)
            assert row.lr * row.weight_decay == pytest.approx(v.lr * v.weight_decay, rel=1e-14)  # what shrinks stays
            assert (row.fan_out, row.fan_in) == shape
            moved += 1
    assert moved == 3 * 4 + 3 + 2 * 6
    assert not any(
        row.muon for row in role_rows(made) if row.role in ("router", "embedding", "head", "norm", "position")
    )


def test_shared_experts_in_one_or_apart() -> None:
    """AdamW's values do not depend on it; Muon's rate goes with the width of one."""
    target = mue.MoE.parse("8e2a2s", width=64, expert=32, layers=2, **SIZES)
    base = mue.Dense(32, 48, 2, head_dim=16, vocab=80)

    def row(**tuned: Any) -> RoleRow:
        made = mue.transfer(base, target, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02, **tuned))
        return in_layers(role_rows(folded(made)))["shared_down", 0]

    adamw, muon = row(), row(optimizer="muon")
    assert (adamw.fan_in, adamw.fan_out, adamw.elements) == (None, 64, 2 * 32 * 64)
    assert (muon.fan_in, muon.fan_out, muon.elements) == (32, 64, 2 * 32 * 64)
