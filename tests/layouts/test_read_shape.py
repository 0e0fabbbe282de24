"""``mue.Dense.of(model)``: shapes read off models, and what cannot be read named with the keyword to pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import mue
from mue.lab.models.language import LanguageModel
from mue.layouts.read_shape import ShapeWarning, UnreadShapeError, read_shape
from support.own_models.case import SHAPES, TUNED
from support.own_models.chains import Chains
from support.own_models.fused import Fused
from support.own_models.lists import Lists
from support.own_models.tied import Tied

KINDS: dict[str, Any] = {"fused": Fused, "lists": Lists, "tied": Tied, "chains": Chains}


@pytest.fixture(autouse=True)
def nothing_is_taken_for_granted() -> Iterator[None]:
    """A warning fails a test that does not expect it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShapeWarning)
        yield


def shapes(name: str) -> tuple[Any, Any]:
    return SHAPES["lists" if name == "chains" else name]


def own(name: str) -> tuple[Any, nn.Module]:
    """One of the models that declare their parameters, with the shape that it was built from."""
    base, target = shapes(name)
    return target, KINDS[name](target, mue.transfer(base, target, TUNED).multipliers)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_declares_its_parameters_is_read_by_them(name: str) -> None:
    shape, model = own(name)
    [block] = [block for block in shape.blocks if block.experts]
    said = {"heads": shape.num_heads, "active": 2, "router": block.router, "sequence": 32, "normalize": True}
    found = type(shape).of(model, **said)
    assert found.num_heads == shape.num_heads and found.num_kv_heads == shape.num_kv_heads
    plans = [mue.transfer(shapes(name)[0], one, TUNED) for one in (found, shape)]
    assert [(r.values, r.count) for r in plans[0].roles.values()] == [
        (r.values, r.count) for r in plans[1].roles.values()
    ]
    assert found.parameters == shape.parameters and (found.vocab, found.sequence) == (shape.vocab, shape.sequence)


def test_what_such_a_model_does_not_say_is_named_all_at_once() -> None:
    _, model = own("fused")
    with pytest.raises(
        UnreadShapeError, match=r"how many attention heads there are: pass heads=\.\.\.; .* pass active="
    ) as no:
        mue.MoE.of(model)
    assert no.value.fields == ("heads", "active", "router")
    with pytest.raises(UnreadShapeError) as fewer:
        mue.MoE.of(model, head_dim=8, router="sigmoid")  # 32 / 8 heads
    assert fewer.value.fields == ("active",)


def test_what_is_taken_for_granted_is_said() -> None:
    _, model = own("fused")
    with pytest.warns(ShapeWarning) as said:
        found = mue.MoE.of(model, heads=4, active=2, router="sigmoid")
    assert found.sequence == 1024
    words = [str(w.message) for w in said]
    assert any("1024 is taken: pass sequence=..." in w for w in words)
    assert any("taken to sum to one" in w and "gate_moments=..." in w for w in words)
    assert said[0].filename == __file__  # the user's line, not ours


def test_a_model_that_has_its_shape_says_it() -> None:
    shape = mue.MoE.parse("8e2a1s", width=64, expert=32, layers=2, head_dim=16, sequence=48, router="softmax")
    model = LanguageModel(shape)
    assert mue.MoE.of(model) == shape
    assert mue.MoE.of(model, sequence=96).sequence == 96
    with pytest.raises(ValueError, match="active is 2 in the model's own shape, and 4 was passed"):
        mue.MoE.of(model, active=4)


def test_another_kind_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"LanguageModel is a Dense \(dense d64 L2\), not a MoE: mue.Dense.of reads it"
    ):
        mue.MoE.of(LanguageModel(mue.Dense(64, 128, 2, head_dim=16)))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"width": 64}, "width is read off the model"),
        ({"head": 4}, "did you mean 'heads'"),
        ({"heads": 3, "sequence": 32}, "fan-in 32, which 3 heads do not divide"),
        ({"heads": 4, "head_dim": 16, "sequence": 32}, "fan-in 32, which 4 heads of 16 do not divide"),
    ],
)
def test_what_contradicts_the_model_is_refused(said: dict[str, Any], words: str) -> None:
    _, model = own("lists")
    with pytest.raises(ValueError, match=words):
        mue.MoE.of(model, active=2, router="softmax", **said)


def test_a_module_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"neither a layout\(\) that declares its parameters nor a config"):
        mue.Dense.of(nn.Linear(4, 4))


class TestStock:
    """Models of ``transformers``: config, family and module are one thing."""

    def test_a_model_its_config_and_its_family(self) -> None:
        pytest.importorskip("transformers", reason="model families need the hf extra")
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        config = Qwen3MoeConfig(
            vocab_size=256, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        )  # fmt: skip
        common = {"width": 64, "expert": 32, "layers": 2, "vocab": 256, "sequence": 64}
        shape = mue.MoE.parse("8e2a", heads=4, kv_heads=2, head_dim=16, router="softmax", **common)
        assert mue.MoE.of(config, sequence=64) == shape
        model = Qwen3MoeForCausalLM(config)
        assert mue.MoE.of(model, sequence=64) == shape
        assert mue.MoE.of(nn.DataParallel(model), sequence=64) == shape
        assert model.config._attn_implementation != "eager"  # it was looked at, not changed
        model.model.layers[1].mlp.gate.weight = nn.Parameter(torch.zeros(9, 64, 1))  # not what its config builds
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate\.weight has shape"):
            mue.MoE.of(model, sequence=64)
        dense = mue.Dense.of("gpt2", sequence=64)
        assert (dense.width, dense.ffn, dense.layers, dense.num_heads, dense.gated, dense.tied) == (
            768,
            3072,
            12,
            12,
            False,
            True,
        )
        with pytest.raises(ValueError, match="heads is 12 in the model's config, and 16 was passed"):
            mue.Dense.of("gpt2", heads=16, sequence=64)
        with pytest.raises(ValueError, match=r"Qwen3MoeConfig is a MoE .*: mue\.MoE\.of reads it"):
            mue.Dense.of(config, sequence=64)

    def test_gates_that_do_not_sum_to_one_want_their_moments(self) -> None:
        pytest.importorskip("transformers", reason="model families need the hf extra")
        with pytest.raises(ValueError, match="set norm_topk_prob = true"):
            mue.MoE.of("olmoe", sequence=64)
        found = mue.MoE.of("olmoe", sequence=64, gate_moments=(0.3, 0.03))
        assert found.gates == "measured" and found.gate_moments == (0.3, 0.03)

    def test_factors_of_its_own_are_said(self) -> None:
        pytest.importorskip("transformers", reason="model families need the hf extra")
        from transformers import GraniteConfig

        with pytest.warns(
            ShapeWarning, match=r"residual_multiplier = 0\.22, which no shape has: set it to 1 before you plan"
        ):
            read_shape(GraniteConfig(residual_multiplier=0.22), sequence=64)
