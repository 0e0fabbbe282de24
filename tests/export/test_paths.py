"""What users say of the paths of a pytree, before there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import mue
from mue.export import STACKS, export
from mue.export.paths import STYLES
from mue.lab.models.diffusion import DiffusionModel
from mue.lab.models.language import LanguageModel
from support.stack_values import ALL, TARGETS, plan


@ALL
@pytest.mark.parametrize("style", STYLES)
def test_every_style_has_a_row_for_every_matrix(kind: str, style: str) -> None:
    text = export(plan(kind), "optax", style).partition("LAYOUT = [")[2].partition("\n]")[0]
    for role in {t.role for t in TARGETS[kind].tensors() if t.matrix}:
        assert f"'{role}'" in text or f'"{role}"' in text
    assert ("head" in text) != TARGETS[kind].tied


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nxn", "no paths like 'nxn'; did you mean 'nnx'"),
        (
            [("a", "attention_qq", "in out")],
            "layout 'a': the plan has no role 'attention_qq'; did you mean 'attention_q'",
        ),
        ([("a", "head+attention_kk", "in out")], "no role 'attention_kk'"),
        ([("a", "bias of nothing", "vector")], "no role 'bias of nothing'"),
        ([("a", "bias of atention_o", "vector")], "'bias of atention_o'; did you mean 'bias of attention_o'"),
        ([("a", "router", "in out")], "the plan has no role 'router'"),  # of a dense one
        ([("{layer}/{layer}/q", "attention_q", "in out")], "once in a path"),
        ([("a", "head", "in ouT")], "unknown axis 'ouT'; did you mean 'out'"),
        ([("a", "head")], "a row of a layout is"),
        ([("a", "head", ("in", "out"))], "three texts"),
        ([("a", "norm", "vector", 2)], "starts at 0"),
        (["a"], "not a list"),
    ],
)
def test_rows_that_are_none(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        export(plan("dense"), "optax", given)


def test_a_torch_model_is_no_pytree() -> None:
    with pytest.raises(ValueError, match="not a LanguageModel: a torch model's names are no paths of a pytree"):
        export(plan("dense"), "optax", LanguageModel(TARGETS["dense"]))
    with pytest.raises(ValueError, match="rows of paths are for optax"):
        export(plan("dense"), "torch", [("a", "head", "in out")])


def test_a_bias_beside_any_weight_is_said() -> None:
    """Control of the refusals: with a row of its own (o), and without one (q)."""
    given = [("{layer}/o", "bias of attention_o", "vector"), ("{layer}/q", "bias of attention_q", "vector")]
    for row in given:
        assert repr(row) in export(plan("dense"), "optax", given)


def test_plans_for_images_are_refused_by_every_file_without_their_module() -> None:
    """And the file for optax, which looks at no module, does not ask for one."""
    image = mue.Image(size=8, channels=1, patch=2, classes=3)
    base = mue.Dense(width=32, ffn=32, layers=2, head_dim=16, image=image)
    made = mue.transfer(base, replace(base, width=64), mue.HParams(lr=0.01, weight_decay=0.02, init_std=0.1))
    for to in STACKS:
        words = "draws images: export..torch" if to == "optax" else "draws images, .* give the planned module"
        with pytest.raises(ValueError, match=words):
            export(made, to)
    assert "time_in" in export(made, "torch", DiffusionModel(made.target))
    with pytest.raises(ValueError, match="has the roles of language models"):
        export(made, "optax", [("a", "head", "in out")])


def test_plans_that_the_file_cannot_say() -> None:
    target, base = TARGETS["experts"], mue.Dense(32, 48, 6, head_dim=16, vocab=80)
    lion = mue.HParams(lr=1e-4, weight_decay=0.1, init_std=0.02, optimizer="lion")
    with pytest.raises(ValueError, match="speaks AdamW and Muon, and this plan is for 'lion'"):
        export(mue.transfer(base, target, lion), "optax")
    pools = mue.MoE.parse("8e2a", width=64, expert=32, layers=2, pools=1, head_dim=16, vocab=80)
    with pytest.raises(ValueError, match="lie in pools that layers share"):
        export(mue.transfer(base, pools, lion.replace(optimizer="adamw")), "optax")
