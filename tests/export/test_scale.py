"""The planned attention scale in files for models that describe themselves: no weight carries it, so the head says it."""

from __future__ import annotations

import pytest

import mue
from mue.export.registry import STACKS
from mue.lab.models.language import LanguageModel
from support.stock_models import planned, tiny

TUNED = mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02)
OWN = ("torch", "transformers", "automodel")  # stacks that train models of the user's


def plan_of(head_dim: int) -> mue.Plan:
    base = mue.Dense(width=64, ffn=64, layers=2, head_dim=head_dim)
    return mue.fold.fold(mue.transfer(base, mue.Dense(width=128, ffn=128, layers=2, head_dim=64), TUNED))


@pytest.mark.parametrize("stack", OWN)
def test_the_head_says_the_scale_of_a_model_that_describes_itself(stack: str) -> None:
    other, same = plan_of(32), plan_of(64)
    model = LanguageModel(other.target, other.multipliers)
    text = other.export(stack, model)
    assert f"to be multiplied by {other.attention_scale!r}" in " ".join(text.split()).replace("# ", "")
    assert "the usual 1/√head_dim = 0.125" in " ".join(text.split())
    assert "attention scale" not in same.export(stack, LanguageModel(same.target, same.multipliers))


def test_the_head_says_that_the_forward_code_changes() -> None:
    assert "the model's forward code stays as it is, but for the attention scale." in plan_of(32).export("torch")
    assert "the model's forward code stays as it is. What" in plan_of(64).export("torch")


def test_stock_models_carry_the_scale_in_their_queries() -> None:
    """No line there: the gain of the query norm is the planned one already, and the file's values say it."""
    config = tiny("qwen3_moe", norm_topk_prob=True)
    plan = planned(config, head_dim=32)
    size = plan.target.head_dim
    assert plan.attention_scale != size**-0.5
    text = plan.export("transformers", config)
    assert "forward code stays as it is. What" in text
    (line,) = [line for line in text.splitlines() if r"q_norm\.weight" in line]
    assert f"None, {plan.attention_scale * size**0.5!r})" in line


@pytest.mark.parametrize("stack", ["torchtitan", "megatron", "olmo-core", "optax"])
def test_every_other_stack_says_or_sets_it(stack: str) -> None:
    plan = plan_of(32)
    text = plan.export(stack)
    said = (
        f"softmax_scale={plan.attention_scale!r}",
        "the attention scale 0.08839",
        f"multiplied by {plan.attention_scale!r}",
    )
    assert any(line in " ".join(text.split()) for line in said)


def test_no_stack_is_forgotten() -> None:
    assert set(STACKS) == {*OWN, "torchtitan", "megatron", "olmo-core", "optax"}
