"""A plan on a model: what init draws, what the optimizer gets, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import mue
from mue.lab.models.language import LanguageModel
from mue.layouts.layout import expert_slices
from mue.layouts.of_model import placed
from mue.model.apply import init_, param_groups
from mue.shapes import Transformer

BASE = mue.Dense(width=64, ffn=64, layers=2, head_dim=16, vocab=128)
TARGET = mue.MoE.parse("8e2a1s", width=128, expert=96, layers=2, head_dim=16, vocab=128)
TUNED = mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02)


def planned(target: Transformer = TARGET, **options: object) -> mue.Plan:
    return mue.transfer(BASE, target, TUNED, **options)  # type: ignore[arg-type]


def built(plan: mue.Plan) -> LanguageModel:
    return LanguageModel(plan.target, plan.multipliers)


def test_every_tensor_and_every_expert_has_its_planned_std() -> None:
    plan = planned()
    model = built(plan)
    init_(plan, model, seed=3)
    drawn = [p for p in placed(model) if p.role not in ("norm", "qk_norm", "final_norm")]
    assert sum(len(list(expert_slices(p))) for p in drawn) == 2 * (4 + 1 + 3 * 8 + 3) + 2  # layers, embedding and head
    for p in placed(model):
        if p.role in ("norm", "qk_norm", "final_norm"):
            assert torch.equal(p.parameter, torch.ones_like(p.parameter))
            continue
        std = plan.role(p.role, p.layer).values.init_std
        assert std is not None
        for expert, part in expert_slices(p):
            n = part.numel()
            assert float(part.detach().std()) == pytest.approx(std, rel=5 / math.sqrt(2 * n)), (p.name, expert)
            assert abs(float(part.detach().mean())) < 5 * std / math.sqrt(n), (p.name, expert)


def test_experts_are_drawn_apart_and_seeds_differ() -> None:
    plan = planned()
    one, two = built(plan), built(plan)
    init_(plan, one, seed=0)
    init_(plan, two, seed=1)
    w = one.get_parameter("blocks.0.moe.experts_up")
    assert not torch.equal(w[0], w[1])
    assert not torch.equal(w, two.get_parameter("blocks.0.moe.experts_up"))
    assert not torch.equal(
        one.get_parameter("blocks.0.attention.q.weight"), one.get_parameter("blocks.1.attention.q.weight")
    )


def test_init_depends_on_names_not_on_order_dtype_or_wrapping() -> None:
    plan = planned()
    one, two = built(plan), built(plan)
    init_(plan, one)
    order = [name for name, _ in two.named_children()]
    for name in reversed(order):  # the same model with its parts registered in another order
        part = two._modules.pop(name)
        two._modules[name] = part
    compiled = torch.compile(two)
    assert isinstance(compiled, torch.nn.Module)
    init_(plan, compiled)
    assert all(torch.equal(a, two.get_parameter(n)) for n, a in one.named_parameters())
    half = built(plan).bfloat16()
    init_(plan, half)
    assert torch.equal(half.head.weight, one.head.weight.bfloat16())


def test_an_expert_is_drawn_alike_whatever_their_number() -> None:
    few, many = planned(), planned(mue.MoE.parse("16e2a1s", width=128, expert=96, layers=2, head_dim=16, vocab=128))
    a, b = built(few), built(many)
    init_(few, a)
    init_(many, b)
    name = "blocks.0.moe.experts_down"
    assert torch.equal(a.get_parameter(name), b.get_parameter(name)[:8])


def test_groups_hold_every_parameter_once_with_its_planned_setting() -> None:
    plan = planned()
    model = built(plan)
    groups = param_groups(plan, model)
    seen = [id(p) for g in groups for p in g["params"]]
    assert len(seen) == len(set(seen)) == len(list(model.parameters()))
    of = {id(p): g for g in groups for p in g["params"]}
    for p in placed(model):
        values, group = plan.role(p.role, p.layer).values, of[id(p.parameter)]
        assert (group["lr"], group["weight_decay"], group["eps"]) == (values.lr, values.weight_decay, values.eps)
        assert p.role in group["roles"] and "initial_lr" not in group and group["betas"] == plan.betas


def test_one_group_per_distinct_setting() -> None:
    plan = planned()
    groups = param_groups(plan, built(plan))
    settings = [(g["lr"], g["weight_decay"], g["eps"]) for g in groups]
    assert len(settings) == len(set(settings)) < 12
    standard = param_groups(planned(rule="standard"), LanguageModel(TARGET, planned(rule="standard").multipliers))
    assert len(standard) == 2  # decayed and not
    torch.optim.AdamW(groups)  # torch takes them as they are


def test_deepcopy_keeps_every_group() -> None:
    # mup's attributes on tensors are lost here; names are not.
    plan = planned()
    model = built(plan)
    sizes = [[p.numel() for p in g["params"]] for g in param_groups(plan, model)]
    assert [[p.numel() for p in g["params"]] for g in param_groups(plan, copy.deepcopy(model))] == sizes


def test_a_dense_base_run_on_its_own_plan_is_the_tuned_values() -> None:
    plan = mue.transfer(BASE, BASE, TUNED)
    groups = param_groups(plan, LanguageModel(BASE))
    assert sorted(group["weight_decay"] for group in groups) == [0.0, TUNED.weight_decay]
    for group in groups:
        assert group["lr"] == TUNED.lr and group["weight_decay"] in (0.0, TUNED.weight_decay)
