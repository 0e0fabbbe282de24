"""Stacks' own models without the stacks: any planned shape written in their names, with fan-in where it belongs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mue
from mue.export import export, rows
from mue.export.megatron import MEGATRON
from mue.export.olmo import OLMO
from mue.export.torchtitan import TORCHTITAN
from mue.fold import fold
from mue.layouts.layout import ParamInfo
from mue.layouts.of_model import placed
from mue.rules.roles import ROLES
from mue.shapes import Transformer

NATIVE = (TORCHTITAN, MEGATRON, OLMO)
MODELS = [(stack, model) for stack in NATIVE for model in stack.models]
HPARAMS = mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02)


def transfer(target: Transformer, base_head: int = 8) -> mue.Plan:
    base = mue.Dense(16, 24, 3, head_dim=base_head, vocab=32, tied=target.tied)
    return mue.transfer(base, target, HPARAMS)


def fans(p: ParamInfo, target: Transformer, block: mue.Block) -> tuple[int, int]:
    """(fan-in, fan-out) of a role in the planned shape, written down a second time."""
    d, kind, part = target.width, ROLES[p.role].kind, ROLES[p.role].part
    kv = target.num_kv_heads * target.head_dim
    hidden = {"ffn": block.ffn, "expert": block.expert, "shared": block.shared_width}.get(kind) or 0
    many = max(len(p.layout.parts), 1)
    if kind == "attention" and many == 3:
        return d, target.attention_width + 2 * kv
    return {
        "embedding": (target.vocab, d),
        "head": (d, target.vocab),
        "router": (d, block.experts),
        "attention": {"q": (d, target.attention_width), "o": (target.attention_width, d)}.get(part, (d, kv)),
    }.get(kind, (hidden, d) if part == "down" else (d, many * hidden))


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([2, 4]),
    head_dim=st.sampled_from([8, 16]),
    kv=st.sampled_from([1, 2]),
    experts=st.sampled_from([4, 6]),
    active=st.integers(2, 4),
    shared=st.booleans(),
    dense=st.booleans(),
    tied=st.booleans(),
)
def test_every_shape_in_every_stacks_names(
    heads: int, head_dim: int, kv: int, experts: int, active: int, shared: bool, dense: bool, tied: bool
) -> None:
    moe = mue.Block(
        layers=1, experts=experts, active=active, expert=10, shared_experts=int(shared), shared=12 if shared else None
    )
    blocks = (mue.Block(layers=2, ffn=40), moe) if dense else (moe,)
    target = mue.Mixed(32, blocks, head_dim=head_dim, heads=heads, kv_heads=kv, vocab=48, tied=tied)
    layers = target.per_layer
    plan = transfer(target)
    for stack, name in MODELS:
        if name == "moe_fused_v2" and dense:
            continue  # has no dense layers
        made = stack.named(target, name)
        for p in placed(made):
            if not ROLES[p.role].vector:
                assert p.parameter.is_meta
                wanted = fans(p, target, layers[p.layer or 0])
                if p.layout.axes == ("expert*in",):  # a flattened router
                    wanted = (wanted[0], 1)
                assert (p.fan_in, p.fan_out) == wanted, p
                if ROLES[p.role].kind == "expert" and p.layout.pattern.count("*") == 1:
                    assert p.experts == experts
        if name != "llama3" or head_dim == 8:  # a fused projection and no norms: nowhere to put another attention scale
            text = export(plan, stack.name, name)
            assert plan.target.name in text


def test_rows_are_right_for_the_module_that_has_them() -> None:
    """A name that two rows fit takes the one whose planned shape it has: here experts stored either way."""
    target = mue.MoE.parse("8e2a", width=32, expert=16, layers=2, head_dim=8, vocab=48)
    for name in ("moe", "moe_dropless"):
        made = OLMO.named(target, name)
        axes = {row.pattern: row.axes for row in OLMO.read(target, made).layout()}
        assert axes == {row.pattern: row.axes for row in made.layout()}


class Bare(nn.Module):
    """A model of a stack's names with one parameter that no table knows."""

    def __init__(self, target: Transformer) -> None:
        super().__init__()
        for name, module in TORCHTITAN.named(target).named_children():
            self.add_module(name, module)
        self.extra = nn.Parameter(torch.empty(3, 3, device="meta"))


def test_an_unknown_parameter_is_an_error_that_names_it() -> None:
    target = mue.Dense(32, 48, 2, head_dim=8, vocab=48)
    plan = transfer(target)
    with pytest.raises(ValueError, match=r"extra \(3, 3\) has no role"):
        export(plan, "torchtitan", Bare(target))

    class Described(Bare):
        def layout(self) -> list[mue.Layout]:
            return [*TORCHTITAN.named(target).layout(), mue.Layout("extra", "attention_o", ("out", "in"))]

    with pytest.raises(ValueError, match="fan-in 3, planned 32"):
        export(plan, "torchtitan", Described(target))


def test_another_model_is_refused() -> None:
    target = mue.Dense(32, 48, 2, head_dim=8, vocab=48)
    other = TORCHTITAN.named(mue.Dense(32, 56, 2, head_dim=8, vocab=48))
    with pytest.raises(ValueError, match="hidden width 56, planned 48"):
        export(transfer(target), "torchtitan", other)
    with pytest.raises(ValueError, match="megatron trains models of its own"):
        export(transfer(target), "megatron", 3)


def test_the_attention_scale_goes_into_both_gains() -> None:
    target = mue.Dense(32, 48, 2, head_dim=16, vocab=48)
    plan = fold(transfer(target), "model")
    code = dict(line.split(", ", 1) for line in export(plan, "torchtitan").splitlines() if line.startswith("    (r"))
    gains = [v for k, v in code.items() if "q_norm" in k or "k_norm" in k]
    assert len(gains) == 2
    c = plan.attention_scale * 16**0.5
    planned = plan.role("qk_norm", 0).values
    for gain in gains:
        lr, wd, eps, std, constant = (None if x == "None" else float(x) for x in gain.split(")")[0].split(", "))
        assert (wd, std) == (0.0, None)
        assert constant == pytest.approx(c**0.5)
        assert lr == pytest.approx((planned.lr or 0) * c**0.5) and eps == pytest.approx((planned.eps or 0) / c**0.5)
    with pytest.raises(ValueError, match="neither query and key norms nor a query projection"):
        export(plan, "torchtitan", "llama3")
    assert f"softmax_scale={plan.attention_scale!r}" in export(transfer(target), "megatron")


@pytest.mark.parametrize(
    ("stack", "blocks", "words"),
    [
        ("megatron", [{"experts": 4, "active": 1, "expert": 8}], "divides sigmoid scores by their sum"),
        *(
            (to, [{"ffn": 8}, {"experts": 4, "active": 2, "expert": 8, "router": "hash"}], f"{to} has no hash router")
            for to in ("megatron", "torchtitan", "olmo-core")
        ),
        ("megatron", [{"shared_experts": 1, "expert": 8}], "no layers with shared experts alone"),
        ("megatron", [{"ffn": 16}, {"ffn": 24}], "the dense layers of .* differ"),
        (
            "olmo-core",
            [{"experts": 4, "active": 2, "expert": 8}, {"experts": 6, "active": 2, "expert": 8}],
            "layers of .* differ in their number",
        ),
        (
            "olmo-core",
            [{"experts": 4, "active": a, "expert": 8, "shared_experts": 1} for a in (2, 3)],
            "differ in active experts",
        ),
    ],
)
def test_what_a_stack_does_not_have_is_refused(stack: str, blocks: list[dict[str, Any]], words: str) -> None:
    target = mue.Mixed(32, tuple(mue.Block(layers=1, **b) for b in blocks), head_dim=8, vocab=48)
    with pytest.raises(ValueError, match=words):
        export(transfer(target), stack)


def test_values_are_those_of_any_other_model_of_the_shape() -> None:
    """The same plan in a stack's names and in the lab's: one set of (role, lr, weight decay, eps, std)."""
    from mue.lab.models.language import LanguageModel

    target = mue.MoE.parse("8e2a1s", width=32, expert=16, layers=3, head_dim=8, vocab=48)
    plan = fold(transfer(target))

    def values(model: nn.Module) -> set[tuple[Any, ...]]:
        split = ((role, row) for row in rows(plan, model) for role in row.roles.split(" + "))
        return {(role, *row.setting, row.std) for role, row in split}

    for stack, name in MODELS:
        wanted = values(LanguageModel(target, plan.multipliers))
        assert values(stack.named(target, name)) == {
            v for v in wanted if v[0] != "qk_norm" or not name.startswith("llama3")
        }
