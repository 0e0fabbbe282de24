"""A plan on a model: what init draws, what the optimizer gets, and what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import mue
from mue.fold import fold
from mue.lab.models.language import LanguageModel
from mue.layouts.layout import Layout, expert_slices
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


# ---- wherever the model is built ------------------------------------------------------------------------------------------


def test_init_does_not_know_of_defaults() -> None:
    """Draws are float32 on the CPU, whatever torch.set_default_dtype and set_default_device say."""
    plan = planned()
    right = built(plan)
    init_(plan, right)
    for dtype in (torch.bfloat16, torch.float64):
        model = built(plan)
        torch.set_default_dtype(dtype)
        try:
            init_(plan, model)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(p, right.get_parameter(n)) for n, p in model.named_parameters())
    model = built(plan)
    with torch.device("meta"):  # a default device that is not the model's
        init_(plan, model)
    assert all(torch.equal(p, right.get_parameter(n)) for n, p in model.named_parameters())


def test_parameters_that_no_draw_fits_are_refused_before_the_first() -> None:
    """Torch's own words would come from the middle of a half-drawn model."""
    plan = planned()
    with torch.inference_mode():
        model = built(plan)
    with pytest.raises(ValueError, match=r"embedding\.weight was made under torch\.inference_mode.*outside of it"):
        init_(plan, model)
    model = built(plan)
    before = model.embedding.weight.detach().clone()
    model.head.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"head\.weight is torch\.float8_e4m3fn.*quantise it then"):
        init_(plan, model)
    assert torch.equal(model.embedding.weight, before)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        init_(plan, built(plan).to(dtype))


def test_a_model_without_memory_is_refused() -> None:
    plan = planned()
    with torch.device("meta"):
        model = built(plan)
    with pytest.raises(ValueError, match=r"embedding\.weight is on the meta device.*to_empty.*then plan\.init_"):
        init_(plan, model)
    assert param_groups(plan, model)  # which need no values
    model.to_empty(device="cpu")
    init_(plan, model)
    one = built(plan)
    init_(plan, one)
    assert torch.equal(model.head.weight, one.head.weight)


# ---- a start at zero ------------------------------------------------------------------------------------------------------


class ZeroStart(LanguageModel):
    """The lab's model, whose table says that some matrices start at a value of the test's."""

    start: float | str = 0.0
    roles: tuple[str, ...] = ("head", "attention_q")

    def layout(self) -> Sequence[Layout]:
        return [replace(r, start=self.start) if r.role in self.roles else r for r in super().layout()]


def test_a_matrix_may_start_at_zero() -> None:
    """As µP advises for the head and the queries (microsoft/mup): said by the table, or by the base's values."""
    plan = planned()
    model, said = ZeroStart(TARGET, plan.multipliers), planned_zero()
    init_(plan, model)
    other = built(said)
    init_(said, other)
    for one in (model, other):
        assert not one.head.weight.any() and not one.blocks[0].attention.q.weight.any()
        assert one.blocks[0].attention.k.weight.any() and one.embedding.weight.any()
    tokens = torch.randint(0, 128, (2, 33))
    for p, one in ((plan, model), (said, other)):
        groups = param_groups(p, one)
        mue.check(
            one,
            p,
            (tokens[:, :-1], tokens[:, 1:]),
            torch.optim.AdamW(groups),
            only=["coverage", "init", "groups", "moved"],
        )
    assert str(said) and said.hash != plan.hash and mue.transfer(said, said.target).role("head").values.init_std == 0
    init_(fold(plan), zero := ZeroStart(TARGET, fold(plan).multipliers))
    assert not zero.head.weight.any()
    with torch.no_grad():
        model.head.weight.fill_(0.1)
    report = mue.check(model, plan, raises=False, only=["init"])
    assert [f.where for f in report.failures] == ["head.weight"]


def planned_zero() -> mue.Plan:
    roles = {"head": {"init_std": 0.0}, "attention_q": {"init_std": 0.0}}
    return mue.transfer(BASE, TARGET, TUNED.replace(roles=roles))


@pytest.mark.parametrize("start", [0.5, "own", "zero"])
def test_another_start_of_a_matrix_is_refused(start: float | str) -> None:
    model = ZeroStart(TARGET, planned().multipliers)
    model.start = start
    with pytest.raises(ValueError, match="attention_q is a matrix, which is drawn or starts at 0"):
        init_(planned(), model)


def test_a_whole_number_is_a_start_too() -> None:
    """``start=0`` of code that multiplies by 1 + w was taken for no start at all."""
    assert Layout("a.w", "norm", ("vector",), start=0) == Layout("a.w", "norm", ("vector",), start=0.0)
    plan = planned()
    model = ZeroStart(TARGET, plan.multipliers)
    model.start, model.roles = 0, ("norm",)
    init_(plan, model)
    assert not model.blocks[0].ffn_norm.weight.any() and bool((model.final_norm.weight == 1).all())


@pytest.mark.parametrize("optimizer", ["lamb", "hyperball", "adafactor"])
def test_a_relative_step_never_leaves_zero(optimizer: str) -> None:
    tuned = TUNED.replace(optimizer=optimizer)
    with pytest.raises(ValueError, match=f"{optimizer} moves a weight in proportion to its size, so it would stay"):
        mue.transfer(BASE, BASE, tuned.replace(roles={"head": {"init_std": 0.0}}), rule="standard")
    plan = mue.transfer(BASE, BASE, tuned, rule="standard")
    with pytest.raises(ValueError, match=f"starts at 0, and {optimizer} moves a weight in proportion to its size"):
        init_(plan, ZeroStart(BASE, plan.multipliers))


# ---- Muon -----------------------------------------------------------------------------------------------------------------


def test_matrices_that_muon_cannot_take_are_named() -> None:
    """torch.optim.Muon takes two axes; a stacked or fused tensor needs another one, and the user hears of it here."""
    muon = TUNED.replace(optimizer="muon")
    routed = mue.MoE.parse("8e2a", width=128, expert=96, layers=2, head_dim=16, vocab=128)
    plan = mue.transfer(BASE, routed, muon)
    with pytest.warns(UserWarning, match=r"blocks\.0\.moe\.experts_gate and 5 more stack several experts"):
        param_groups(plan, built(plan))
    dense = mue.transfer(BASE, replace(BASE, width=128), muon)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = param_groups(dense, built(dense))
    torch.optim.Muon(
        [{k: v for k, v in g.items() if k in ("params", "lr")} for g in groups if g["algorithm"] == "muon"]
    )


def test_fused_matrices_are_named_for_muon() -> None:
    plan = mue.transfer(BASE, replace(BASE, width=128), TUNED.replace(optimizer="muon"))

    class Fused(LanguageModel):
        def __init__(self) -> None:
            super().__init__(plan.target, plan.multipliers)
            for block in self.blocks:
                block.attention.qkv = torch.nn.Linear(128, 3 * 128, bias=False)  # type: ignore[union-attr]
                for part in "qkv":
                    delattr(block.attention, part)

        def layout(self) -> Sequence[Layout]:
            parts = ("attention_q", "attention_k", "attention_v")
            row = Layout("blocks.*.attention.qkv.weight", parts[0], ("out", "in"), parts)
            return [row, *(r for r in super().layout() if r.role not in parts)]

    with pytest.warns(UserWarning, match=r"blocks\.0\.attention\.qkv\.weight and 1 more hold several matrices"):
        param_groups(plan, Fused())
