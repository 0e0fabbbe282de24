"""The model must be the planned one: sizes of every tensor, and who may read something else than the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from torch import nn

import mue
from mue.fold import fold
from mue.lab.models.language import LanguageModel
from mue.layouts.layout import Layout
from mue.model.apply import init_, param_groups
from mue.model.match import match_model
from mue.model.tensor_plan import tensor_plans
from mue.plan.values import Multipliers
from mue.shapes import Transformer
from support.own_models.case import SHAPES
from support.own_models.chains import Chains

BASE = mue.Dense(width=64, ffn=64, layers=2, head_dim=16, vocab=128)
TARGET = mue.MoE.parse("8e2a1s", width=128, expert=96, layers=2, head_dim=16, vocab=128)
NARROW = mue.MoE.parse("8e2a", width=64, expert=40, layers=2, head_dim=16, vocab=128)
TUNED = mue.HParams(lr=2e-3, weight_decay=0.1, init_std=0.02)


def planned(target: Transformer = TARGET, **options: object) -> mue.Plan:
    return mue.transfer(BASE, target, TUNED, **options)  # type: ignore[arg-type]


def built(plan: mue.Plan) -> LanguageModel:
    return LanguageModel(plan.target, plan.multipliers)


OTHER = {
    "width": ({"width": 64}, "residual width|width"),
    "expert width": ({"expert": 48, "shared": 96}, "hidden width 48, planned 96"),
    "shared width": ({"shared": 48}, "hidden width 48, planned 96"),
    "experts": ({"experts": 4}, "experts 4, planned 8"),
    "layers": ({"layers": 3}, "is in layer 2, the plan has 2 layers"),
    "vocabulary": ({"vocab": 64}, "vocabulary 64, planned 128"),
    "heads": ({"heads": 4}, "fan-in 64, planned 128"),
    "tied": (
        {"tied": True},
        "tied = false, the model's head is its embedding: plan with tied = true in the target, or give the model a head",
    ),
    "no shared experts": ({"shared_experts": 0}, "the plan has .* tensors of role shared_up, the model none"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_model_of_another_shape_is_refused(name: str) -> None:
    # The granularity and forgotten-dimension cases that mup takes for a width, silently, are here.
    changes, message = OTHER[name]
    numbers = {
        "experts": 8,
        "active": 2,
        "shared_experts": 1,
        "width": 128,
        "expert": 96,
        "layers": 2,
        "head_dim": 16,
        "vocab": 128,
    }
    model = LanguageModel(mue.MoE(**{**numbers, **changes}))  # type: ignore[arg-type]
    model.multipliers = planned().multipliers
    with pytest.raises(ValueError, match=message):
        match_model(planned(), model)


def test_the_right_model_is_not_refused() -> None:
    assert len(match_model(planned(), built(planned()))) == len(list(built(planned()).parameters()))


@pytest.mark.parametrize("name", ["residual", "head", "attention_scale", "output", "route"])
def test_other_multipliers_than_planned_are_refused(name: str) -> None:
    plan = planned()
    m = plan.multipliers
    changed = tuple(x * 2 for x in getattr(m, name)) if name in ("output", "route") else getattr(m, name) * 2
    wrong = Multipliers(**{**m.__dict__, name: changed})
    with pytest.raises(ValueError, match=f"{name} multiplier is .*, planned"):
        param_groups(plan, LanguageModel(plan.target, wrong))


def test_a_stock_model_is_refused_until_its_multipliers_are_planned() -> None:
    with pytest.raises(ValueError, match=r"build it with plan\.multipliers"):
        init_(planned(), LanguageModel(TARGET))


# ---- experts that layers share -------------------------------------------------------------------------------------------

POOLED = replace(TARGET, layers=4, pools=2)


def test_shared_experts_are_in_one_group_once_and_drawn_once() -> None:
    plan = planned(POOLED)
    model = built(plan)
    init_(plan, model, seed=3)
    grouped = [p for g in param_groups(plan, model) for p in g["params"]]
    assert sum(p.numel() for p in grouped) == plan.target.parameters and len({id(p) for p in grouped}) == len(grouped)
    down = plan.roles["expert_down"].values.init_std
    assert model.pools[0].down.detach().std().item() == pytest.approx(down, rel=0.02)
    assert not model.pools[0].down.equal(model.pools[1].down)
    found = {p.name: p.layers for p in match_model(plan, model) if p.role == "expert_down"}
    assert found == {"pools.0.down": (0, 1), "pools.1.down": (2, 3)}


def test_layers_share_their_experts_as_planned_or_are_refused() -> None:
    own, four, one = (planned(replace(POOLED, pools=n)) for n in (0, 4, 1))
    with pytest.raises(ValueError, match=r"blocks\.0\.moe\.experts_gate is read by layer 0, planned for layers 0–1"):
        match_model(planned(POOLED), built(own))
    with pytest.raises(ValueError, match=r"pools\.0\.gate is read by layers 0–1, planned for layer 0"):
        match_model(own, built(planned(POOLED)))
    with pytest.raises(ValueError, match=r"pools\.0\.up is read by layers 0–3, planned for layers 0–1"):
        match_model(planned(POOLED), built(one))
    match_model(own, built(four))  # a pool that one layer reads is its own


def test_what_layers_share_has_one_planned_value() -> None:
    """Attention shared by two blocks (as in ALBERT) is planned alike for both; where one block has its own rate it is refused."""

    class Shared(LanguageModel):
        def __init__(self, plan: mue.Plan) -> None:
            super().__init__(plan.target, plan.multipliers)
            self.blocks[2].attention = self.blocks[0].attention

    match_model(planned(replace(TARGET, layers=3)), Shared(planned(replace(TARGET, layers=3))))
    thirds = mue.transfer(
        BASE, replace(TARGET, layers=3), replace(TUNED, roles={"last_third": {"attention_q": {"lr_times": 2.0}}})
    )
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.q\.weight is read by layers 0, 2, for which"):
        match_model(thirds, Shared(thirds))


def test_a_third_of_its_own_does_not_cut_a_pool() -> None:
    tuned = replace(TUNED, roles={"first_third": {"ffn_down": {"lr_times": 2.0}}})
    with pytest.raises(ValueError, match=r"3 layers read each pool of experts, and tuned\.roles has"):
        mue.transfer(BASE, replace(POOLED, layers=6), tuned)
    plan = mue.transfer(BASE, replace(POOLED, layers=6, pools=3), tuned)
    rates = [group["lr"] for group in param_groups(plan, built(plan)) for _ in group["params"]]
    assert len(rates) == len(list(built(plan).parameters()))
    assert plan.role("expert_down", 0).values.lr == 2 * plan.role("expert_down", 2).values.lr  # type: ignore[operator]


# ---- who may read something else than the residual stream -----------------------------------------------------------------


class RouterMLP(LanguageModel):
    """The same model with a router of two matrices: width → latent → experts."""

    def __init__(self, plan: mue.Plan, latent: int, read: int, scores: int) -> None:
        super().__init__(plan.target, plan.multipliers)
        for block in self.blocks:
            block.moe.router.inner = nn.Linear(plan.target.width, latent, bias=False)  # type: ignore[union-attr]
            block.moe.router.weight = nn.Parameter(block.moe.router.weight.new_empty(scores, read))  # type: ignore[union-attr]

    def layout(self) -> Sequence[Layout]:
        return [*super().layout(), Layout("blocks.*.moe.router.inner.weight", "router", ("out", "in"))]


def test_a_router_that_is_an_mlp_has_its_own_fan_ins() -> None:
    """Conventions 8: f/f* in place of r for every role that reads the residual width, the router among them."""
    plan = planned(NARROW)
    found = {s.info.name: s.values for s in tensor_plans(plan, RouterMLP(plan, latent=16, read=16, scores=8))}
    whole = plan.roles["router"].values
    assert found["blocks.0.moe.router.inner.weight"] == whole
    last, ratio = found["blocks.0.moe.router.weight"], 16 / 64
    assert last.init_std == pytest.approx(whole.init_std * ratio**-0.5)  # type: ignore[operator]
    assert last.lr == pytest.approx(whole.lr / ratio)  # type: ignore[operator]
    assert last.weight_decay == pytest.approx(whole.weight_decay * ratio)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("latent", "read", "scores", "message"),
    [
        (16, 24, 8, r"router\.weight \(8, 24\): fan-in 24, planned 64"),
        (16, 16, 6, r"router\.weight \(6, 16\): fan-in 16, planned 64"),
        (16, 64, 6, r"router\.weight \(6, 64\): experts 6, planned 8"),
        (64, 64, 64, r"router\.weight \(64, 64\): experts 64, planned 8"),
    ],
)
def test_a_router_whose_matrices_do_not_meet_is_refused(latent: int, read: int, scores: int, message: str) -> None:
    plan = planned(NARROW)
    with pytest.raises(ValueError, match=message):
        match_model(plan, RouterMLP(plan, latent, read, scores))


def test_what_reads_the_residual_stream_has_its_width() -> None:
    plan = planned(NARROW)
    model = LanguageModel(plan.target, plan.multipliers)
    for name in ("experts_up", "experts_gate"):
        weight = getattr(model.blocks[1].moe, name)
        setattr(model.blocks[1].moe, name, nn.Parameter(weight.new_empty(8, 40, 24)))
    with pytest.raises(ValueError, match=r"blocks\.1\.moe\.experts_up \(8, 40, 24\): residual width 24, planned 64"):
        match_model(plan, model)


# ---- words of a table that are wrong --------------------------------------------------------------------------------------


class Renamed(LanguageModel):
    """The planned model, one role of whose table is another one."""

    def __init__(self, plan: mue.Plan, roles: dict[str, str | None]) -> None:
        super().__init__(plan.target, plan.multipliers)
        self.roles = roles

    def layout(self) -> Sequence[Layout]:
        rows = [replace(r, role=self.roles.get(r.pattern, r.role) or "norm") for r in super().layout()]
        return [r for r in rows if self.roles.get(r.pattern, "") is not None]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["folded", "multipliers"])
def test_a_final_norm_that_is_declared_as_any_norm_is_refused(tied: bool, form: str) -> None:
    """On a tied, folded plan its gain carries the head multiplier, which would be lost without a word."""
    plan = mue.transfer(replace(BASE, tied=tied), replace(TARGET, tied=tied), TUNED)
    plan = fold(plan) if form == "folded" else plan
    init_(plan, Renamed(plan, {}))
    wrong = Renamed(plan, {"final_norm.weight": "norm"})
    for apply in (init_, param_groups):
        with pytest.raises(ValueError, match=r"final_norm\.weight.*(Give that|give it) th(e|at) role"):
            apply(plan, wrong)
    with pytest.raises(ValueError, match=r"final_norm\.weight"):
        plan.export("torch", wrong)


def test_norms_of_blocks_are_no_final_norm() -> None:
    plan = planned()
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn_norm\.weight has the role final_norm, but lies in a block"):
        init_(plan, Renamed(plan, {"blocks.*.ffn_norm.weight": "final_norm"}))


class NoFinalNorm(LanguageModel):
    """A last norm without a gain, as OLMo has it."""

    def __init__(self, plan: mue.Plan) -> None:
        super().__init__(plan.target, plan.multipliers)
        self.final_norm = nn.LayerNorm(plan.target.width, elementwise_affine=False)  # type: ignore[assignment]

    def layout(self) -> Sequence[Layout]:
        return [r for r in super().layout() if r.role != "final_norm"]


def test_a_head_multiplier_without_a_gain_to_carry_it_is_refused() -> None:
    tied = mue.transfer(replace(BASE, tied=True), replace(TARGET, tied=True), TUNED)
    with pytest.raises(
        ValueError, match=r"head multiplier \(0\.5\) is in the gain of the final norm.*use an untied head"
    ):
        init_(fold(tied), NoFinalNorm(fold(tied)))
    init_(tied, NoFinalNorm(tied))  # the model multiplies its logits itself
    init_(fold(planned()), NoFinalNorm(fold(planned())))  # the head's own tensor carries it
    same = fold(mue.transfer(replace(TARGET, tied=True), replace(TARGET, tied=True), TUNED))
    init_(same, NoFinalNorm(same))  # 1 has to be carried by nothing


def test_a_model_of_fewer_layers_is_refused() -> None:
    plan = planned(replace(TARGET, layers=4))
    model = built(planned())
    model.multipliers = plan.multipliers
    with pytest.raises(ValueError, match="the plan has 4 layers, and the model no tensor in layer 2, 3"):
        match_model(plan, model)


def test_a_missing_role_is_said_first_and_like_tensors_once() -> None:
    base, target = SHAPES["lists"]
    plan = mue.transfer(base, replace(target, width=64), TUNED)
    model = Chains(plan.target, plan.multipliers)
    both = Layout("h.*.experts.*.*.weight", "expert_down", ("out", "in"))
    model.rows |= {"fc": both, "proj": both}
    model.layout = lambda: list(dict.fromkeys(Chains.layout(model)))  # type: ignore[method-assign]
    with pytest.raises(ValueError) as no:
        plan.init_(model)
    _, first, *others = str(no.value).splitlines()
    assert "the plan has 8 tensors of role expert_up, the model none" in first
    [tensor] = [line for line in others if "experts.0.0.weight" in line]
    assert tensor.endswith("(and 7 more like it)") and "experts.1." not in str(no.value)
