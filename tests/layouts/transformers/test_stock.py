"""A plan on stock transformers code: folded training equals multiplier-form training, and what it saves is a stock model."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="model families need the hf extra")

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import mue
from mue.fold import fold
from mue.layouts.of_model import placed
from mue.model.apply import init_, param_groups
from mue.model.coefficients import coefficients
from support.precision import close
from support.stock_models import planned, stock, tiny, train

torch.set_num_threads(1)


class Times(nn.Module):
    """A weight used as c·W."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = c

    def forward(self, w: Tensor) -> Tensor:
        return w * self.c

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / self.c


def multiplier_form(model: nn.Module, plan: mue.Plan, folded: mue.Plan) -> list[dict[str, Any]]:
    """Wrap every folded weight of ``model`` as c·W, and return the groups of the plan with multipliers."""
    names = {id(p): n for n, p in model.named_parameters()}
    roles = {p.name: p for p in placed(model)}
    groups = []
    for parameter, c in coefficients(folded, model).items():
        name = names[id(parameter)]
        p = roles[name]
        values = plan.role(p.role, p.layer).values
        if p.role in ("attention_q", "attention_k", "attention_v") and p.fan_in != plan.target.width:
            f = p.fan_in / plan.target.width
            assert values.lr is not None and values.weight_decay is not None and values.eps is not None
            lr, wd, eps = values.lr / f, values.weight_decay * f, values.eps / f
        else:
            lr, wd, eps = values.lr, values.weight_decay, values.eps  # type: ignore[assignment]
        if c != 1:
            owner, leaf = name.rpartition(".")[0], name.rpartition(".")[2]
            module = model.get_submodule(owner)
            register_parametrization(module, leaf, Times(c))
            parameter = module.parametrizations[leaf].original  # type: ignore[union-attr,index,assignment]
        groups.append({"params": [parameter], "lr": lr, "weight_decay": wd, "eps": eps, "betas": plan.betas})
    return groups


CASES: dict[str, tuple[str, dict[str, Any], tuple[float, float] | None, str]] = {
    "mixtral": ("mixtral", {}, None, "weights"),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}, None, "weights"),
    "olmoe, renormalised": ("olmoe", {"norm_topk_prob": True}, None, "weights"),
    "olmoe, measured": ("olmoe", {}, (0.31, 0.05), "weights"),
    "deepseek_v3": ("deepseek_v3", {"routed_scaling_factor": 2.0}, None, "model"),
    "deepseek_v3, R in the weights": ("deepseek_v3", {"routed_scaling_factor": 1.0}, None, "weights"),
    "gpt_oss": ("gpt_oss", {}, None, "weights"),
}


# The sums between tokens and logits: two layers, each of products over widths of up to 80 and 37 tokens, and the head's.
OPERATIONS = 2 * (4 * 80 + 2 * 37 + 3 * 80) + 80

SLOW = ("mixtral", "qwen3_moe", "olmoe, renormalised", "deepseek_v3, R in the weights")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_folded_training_on_stock_code_is_multiplier_training(case: str, tmp_path: Path) -> None:
    family, settings, moments, route = CASES[case]
    config = tiny(family, **settings)
    plan = planned(config, moments=moments)
    folded = fold(plan, route)
    mine, theirs = stock(config), stock(config)
    init_(folded, mine, seed=5)
    theirs.load_state_dict(mine.state_dict())
    other = multiplier_form(theirs, plan, folded)
    assert any("parametrizations" in n for n, _ in theirs.named_parameters())
    before = {n: p.detach().clone() for n, p in mine.named_parameters()}
    train(mine, param_groups(folded, mine))
    train(theirs, other)
    for name, p in mine.named_parameters():
        owner, _, leaf = name.rpartition(".")
        effective = getattr(theirs.get_submodule(owner), leaf)
        assert float((p - effective).detach().abs().max()) < 1e-10, name
        if "experts" not in name:  # tokens may never have reached an expert
            assert not torch.equal(p, before[name]), f"{name} never moved"
    # What it saves is a stock model: stock loading, equal logits.
    mine.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = type(mine).from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )  # type: ignore[attr-defined]
    tokens = torch.arange(3, 40)[None]
    saved = loaded.state_dict()
    assert all(
        torch.equal(saved[name], value) for name, value in mine.state_dict().items()
    )  # a file's numbers are exact
    with torch.no_grad():  # what is computed from them is not: read through a mapping, they lie elsewhere in memory
        logits = mine.eval()(input_ids=tokens).logits
        assert close(loaded(input_ids=tokens).logits, logits, operations=OPERATIONS)
        control = [(p.name, p.parameter) for p in placed(loaded) if p.role in ("attention_o", "head")]
        assert len(control) >= 3
        for place_of, parameter in control:
            parameter.mul_(1.01)  # negative control: one multiplier off by 1 %
            assert not close(loaded(input_ids=tokens).logits, logits, operations=OPERATIONS), place_of
            parameter.div_(1.01)
        assert close(loaded(input_ids=tokens).logits, logits, operations=OPERATIONS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "dbrx", "qwen3_next"])
def test_init_and_groups_reach_every_parameter(family: str) -> None:
    config = tiny(family)
    model = stock(config)
    if family == "qwen3_next":  # hybrid: its two kinds of mixers have one output fan-in only if the sizes agree
        with pytest.raises(AssertionError, match="several fan-ins"):
            planned(config)
        return
    folded = fold(planned(config))
    init_(folded, model)
    held = [p for g in param_groups(folded, model) for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == len({id(p) for p in held})
    for p in placed(model):
        std = folded.role(p.role, p.layer).values.init_std
        if std is not None and p.parameter.numel() > 2000 and "vector" not in p.layout.axes:
            assert float(p.parameter.detach().std()) == pytest.approx(std, rel=0.1), p.name


def test_a_changed_attention_scale_goes_into_the_queries() -> None:
    for family, place_of in (("llama", r"q_proj\.weight"), ("qwen3", r"q_norm\.weight")):
        config = tiny(family)
        same, half = fold(planned(config, head_dim=16)), fold(planned(config, head_dim=8))
        assert half.attention_scale == pytest.approx(same.attention_scale / 2**0.5)
        a, b = stock(config), stock(config)
        init_(same, a)
        init_(half, b)
        ratios = {
            n: float((q / p).detach().flatten()[0])
            for (n, p), q in zip(a.named_parameters(), b.parameters(), strict=True)
        }
        assert {n for n, r in ratios.items() if abs(r - 1) > 1e-6} == {n for n in ratios if re.search(place_of, n)}
        assert all(r == pytest.approx(0.5**0.5) for n, r in ratios.items() if re.search(place_of, n))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_queries_train_as_under_another_attention_scale(family: str) -> None:
    """Into the query projection and its bias (Qwen 2), or the query norm's gain (Qwen 3), against code that scales by it."""
    config = tiny(family)
    plan = fold(planned(config, head_dim=8))
    mine, theirs = stock(config), stock(config)
    init_(plan, mine)
    theirs.load_state_dict(mine.state_dict())
    c = {p.name: coefficients(plan, mine)[p.parameter] for p in placed(mine)}
    ratio = plan.attention_scale * 4  # of the stock 1/√16
    own = {n for n, v in c.items() if v == pytest.approx(ratio)}
    leaves = {n.split("self_attn.")[1] for n in own}
    assert leaves == ({"q_proj.weight", "q_proj.bias"} if family == "qwen2" else {"q_norm.weight"})
    groups = []
    with torch.no_grad():
        for layer in theirs.model.layers:  # type: ignore[union-attr]
            layer.self_attn.scaling *= ratio  # type: ignore[union-attr,operator]
        for p in placed(theirs):
            v = plan.role(p.role, p.layer).values
            k = c[p.name] if p.role == "bias" and p.name not in own else 1.0  # the fold's own, of other biases
            assert v.lr is not None and v.weight_decay is not None and v.eps is not None
            groups.append(
                {"params": [p.parameter], "lr": v.lr * k, "weight_decay": v.weight_decay / k, "eps": v.eps / k}
            )
            if p.name in own:
                p.parameter.div_(ratio)
    train(mine, param_groups(plan, mine), 30)
    train(theirs, [{**g, "betas": plan.betas} for g in groups], 30)
    for p, q in zip(placed(mine), placed(theirs), strict=True):
        effective = q.parameter * (ratio if p.name in own else 1.0)
        assert float((p.parameter - effective).detach().abs().max()) < 1e-10, p.name


def test_what_stock_code_cannot_carry_is_refused() -> None:
    config = tiny("mixtral")
    plan = planned(config)
    with pytest.raises(ValueError, match=r"no forward multipliers: use mue\.fold\.fold\(plan\)"):
        param_groups(plan, stock(config))
    with pytest.raises(ValueError, match=r"has no route scale|routed sum is scaled by 1, the plan wants 2"):
        param_groups(fold(plan, "model"), stock(config))
    v3 = tiny("deepseek_v3", routed_scaling_factor=2.5)
    with pytest.raises(ValueError, match=r"routed sum is scaled by 2.5, the plan wants 2"):
        param_groups(fold(planned(v3), "model"), stock(v3))


def test_double_scaling_is_refused() -> None:
    config = tiny("granitemoe", residual_multiplier=0.22)
    with pytest.raises(ValueError, match=r"residual_multiplier = 0\.22 already scales .* set residual_multiplier = 1"):
        param_groups(fold(planned(config)), stock(config))


def test_another_model_than_planned_is_refused() -> None:
    plan = fold(planned(tiny("mixtral")))
    other = tiny("mixtral", intermediate_size=56)  # another granularity: mup takes it for a width, silently
    with pytest.raises(ValueError, match="hidden width 56, planned 80"):
        param_groups(plan, stock(other))
    with pytest.raises(ValueError, match="experts 4, planned 8"):
        param_groups(plan, stock(tiny("mixtral", num_local_experts=4)))


def test_wrapped_and_copied_stock_models_have_the_same_groups() -> None:
    config = tiny("mixtral")
    plan, model = fold(planned(config)), stock(config)
    sizes = [[p.numel() for p in g["params"]] for g in param_groups(plan, model)]
    wrapper = nn.Module()
    wrapper.module = copy.deepcopy(model)
    for other in (copy.deepcopy(model), torch.compile(copy.deepcopy(model)), wrapper):
        assert [[p.numel() for p in g["params"]] for g in param_groups(plan, other)] == sizes  # type: ignore[arg-type]
