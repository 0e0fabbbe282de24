"""Folding: the same training without forward multipliers, for every optimizer of table 6.2, and back in mid-training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_ as plain_clip
from torch.optim import Optimizer

import mue
from mue.fold import FOLDS, agc, clip_grad_norm_, coefficients, convert, fold, fold_numbers, unfold
from mue.shapes import Transformer
from support import fold_optimizers as exact
from support.fold_model import Decoder, tokens, train
from support.precision import close, rounding

STEPS = 200
# Between tokens and logits of one layer of the sizes below: eight products over up to 15, attention and norms over 12.
OPERATIONS = 8 * 15 + 6 * 12
SIZES: dict[str, Any] = {"head_dim": 4, "vocab": 11, "sequence": 8}
# Every multiplier differs from 1 and none is a power of two: e = 9/8 or 5/4 against 2, three layers against one, width 12.
BASE = mue.Dense(width=4, ffn=8, layers=3, **SIZES)
MOE = mue.MoE.parse("4e2a1s", width=12, expert=5, layers=1, shared=5, **SIZES)
DENSE = mue.Dense(width=12, ffn=15, layers=1, **SIZES)
TUNED = mue.HParams(lr=4e-3, weight_decay=0.5, init_std=0.3, eps=1e-3)
ROUTED = mue.MoE.parse("4e2a", width=12, expert=5, layers=1, **SIZES)

# What an optimizer needs to move at all; Adafactor's eps1 must not bind, for torch reads it as two different things.
OWN: dict[str, dict[str, float]] = {"sgd": {"lr": 2e-2}, "adafactor": {"eps": 1e-30}}

MAKE: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "adamw": lambda g: torch.optim.AdamW(g, fused=True),
    "adamw-amsgrad": lambda g: torch.optim.AdamW(g, amsgrad=True, fused=True),
    "nadamw": lambda g: torch.optim.NAdam(g, decoupled_weight_decay=True, foreach=True),
    "adamw-independent": exact.IndependentAdamW,
    "adam-l2": lambda g: torch.optim.Adam(g, fused=True),
    "lion": exact.Lion,
    "signsgd": exact.SignSGD,
    "sgd": lambda g: torch.optim.SGD(g, fused=True),
    "sgd-decoupled": exact.DecoupledSGD,
    "muon": exact.ExactMuon,
    "shampoo": exact.Shampoo,
    "soap": exact.Soap,
    "lamb": exact.Lamb,
    "lars": exact.Lars,
    "adafactor": torch.optim.Adafactor,
    "hyperball": exact.Hyperball,
}
FAMILY = {"adamw-amsgrad": "adamw", "sgd-decoupled": "sgd"}  # whose row an optimizer above takes, if not its own


@pytest.fixture(autouse=True)
def _one_thread_in_float64() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def planned(optimizer: str, target: Transformer | None = None, **changes: Any) -> mue.Plan:
    """A plan in multiplier form for an optimizer (or its family), on a target that the rule can plan for it."""
    family = FAMILY.get(optimizer, optimizer)
    rule = "hyperp" if family == "hyperball" else "complete-mue"
    tuned = TUNED.replace(**{"optimizer": family, **OWN.get(family, {}), **changes})
    target = target or {"adamw": MOE, "adafactor": MOE, "muon": ROUTED, "hyperball": replace(DENSE, ffn=24)}.get(
        family, DENSE
    )
    return mue.transfer(BASE, target, tuned, rule=rule)


def model_of(plan: mue.Plan, seed: int = 0) -> Decoder:
    """The planned model, with biases that are not zero."""
    model = Decoder(plan.target, plan.multipliers)
    plan.init_(model, seed)
    return model


def twins(plan: mue.Plan, route: str = "weights") -> tuple[Decoder, Decoder, mue.Plan]:
    """The model in both forms with the same effective weights, biases away from zero."""
    folded = fold(plan, route)
    one, two = model_of(plan), Decoder(plan.target, folded.multipliers)
    with torch.no_grad():
        for name, p in one.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    convert(one, plan, two, folded)
    return one, two, folded


def distance(one: Decoder, two: Decoder, folded: mue.Plan) -> float:
    """Largest relative difference of an effective weight, over all parameters."""
    c = coefficients(folded, two)
    found = []
    for (_, p), (_, q) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        effective = p * c[q]
        found.append(((effective - q).abs().max() / effective.abs().max().clamp_min(1e-30)).item())
    return max(found)


# ---- every optimizer -------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Two layers of which the second is three stacked experts with biases; each weight is used through its own c."""

    def __init__(self, scale: tuple[float, ...]) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(5)
        shapes = ((8, 6), (3, 7, 8), (3, 1, 7), (5, 7))
        self.weights = torch.nn.ParameterList(0.4 * torch.randn(s, generator=noise) for s in shapes)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        first, experts, bias, last = (c * w for c, w in zip(self.scale, self.weights, strict=True))
        return (torch.tanh(x @ first.mT) @ experts.mT + bias).tanh().mean(0) @ last.mT

    def run(self, optimizer: Optimizer, steps: int) -> None:
        for step in range(steps):
            x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - step / 300)
            optimizer.zero_grad()
            (self(x) - x[:, :5].sin()).square().mean().backward()
            optimizer.step()


def net_groups(optimizer: str, net: Net, cs: tuple[float, ...], lr: float, eps: float) -> list[dict[str, Any]]:
    """One group per weight, with ``cs`` folded into its numbers."""
    made = []
    for w, c in zip(net.weights, cs, strict=True):
        a, b, e = fold_numbers(optimizer, c, lr, 0.5, eps)
        extra = {"eps": (e, 1e-3 * c)} if optimizer == "adafactor" else {"eps": e}
        made.append(
            {"params": [w], "lr": a, "initial_lr": a, "weight_decay": b, "momentum": 0.9, "betas": (0.9, 0.95), **extra}
        )
    return made


def test_every_row_of_the_table_is_trained() -> None:
    assert set(FOLDS) == {FAMILY.get(name, name) for name in MAKE}


@pytest.mark.parametrize("name", list(MAKE))
def test_two_hundred_steps_in_float64(name: str) -> None:
    """Property 12, for every row of table 6.2 with the corrections of conventions 7."""
    optimizer = FAMILY.get(name, name)
    # The eigenbasis of a matrix without full rank is stable only if nothing is rounded.
    cs = (1.0, 0.25, 0.25, 2.0) if name == "soap" else (1.0, 8 / 9, 8 / 9, 0.37)
    lr = {"sgd": 0.1, "hyperball": 0.02, "lars": 0.02}.get(optimizer, 4e-3)
    eps = 1e-30 if optimizer == "adafactor" else 1e-3
    one, two = Net(cs), Net((1.0,) * 4)
    with torch.no_grad():
        for w, c in zip(two.weights, cs, strict=True):
            w.mul_(c)
    start = [w.clone() for w in one.weights]
    one.run(MAKE[name](net_groups(optimizer, one, (1.0,) * 4, lr, eps)), STEPS)
    two.run(MAKE[name](net_groups(optimizer, two, cs, lr, eps)), STEPS)
    for w, v, before, c in zip(one.weights, two.weights, start, cs, strict=True):
        assert ((c * w - v).abs().max() / v.abs().max()).item() < 1e-12
        assert ((w - before).norm() / before.norm()).item() > 0.02, "a training that does not move proves nothing"


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", "adamw-independent", "adam-l2", "nadamw", "lion", "sgd", "muon", "lamb", "adafactor", "hyperball"],
)
def test_a_planned_model_and_its_folded_form(optimizer: str) -> None:
    """Every optimizer a plan can be made for, through ``param_groups``, on a decoder with every role and with biases."""
    plan = planned(optimizer)
    one, two, folded = twins(plan)
    steps = STEPS if optimizer == "adamw" else 50
    train(one, [MAKE[optimizer](plan.param_groups(one))], steps)
    train(two, [MAKE[optimizer](folded.param_groups(two))], steps)
    assert distance(one, two, folded) < 1e-12


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "sgd", "adafactor"])
@pytest.mark.parametrize("forgotten", ["lr", "weight_decay", "eps"])
def test_control_forgetting_a_cell(optimizer: str, forgotten: str) -> None:
    """Folding the weights and leaving out one number is seen at once; where the table has no change there is nothing to forget."""
    power = getattr(FOLDS[optimizer], forgotten)
    if power in (None, 0):
        return
    plan = planned(optimizer)
    one, two, folded = twins(plan)
    c = coefficients(folded, two)
    wrong = []
    for g in folded.param_groups(two):
        for p in g["params"]:
            value = g[forgotten]
            back = (value[0] / c[p] ** power, value[1]) if isinstance(value, tuple) else value / c[p] ** power
            wrong.append({**g, "params": [p], forgotten: back, **({"initial_lr": back} if forgotten == "lr" else {})})
    train(one, [MAKE[optimizer](plan.param_groups(one))], 40)
    train(two, [MAKE[optimizer](wrong)], 40)
    visible = distance(one, two, folded) > 1e-6
    # eps1 of Adafactor is a guard against dividing by zero: it binds nowhere, so forgetting it shows nowhere.
    assert visible or (optimizer, forgotten) == ("adafactor", "eps")


def test_control_copying_adamw_to_another_optimizer() -> None:
    """AdamW's row (lr·c) is badly wrong for a relative optimizer, and for SGD."""
    for optimizer in ("lamb", "sgd"):
        plan = planned(optimizer)
        one, two, folded = twins(plan)
        c = coefficients(folded, two)
        copied = []
        for g in folded.param_groups(two):
            for p in g["params"]:
                lr = g["lr"] / c[p] ** FOLDS[optimizer].lr * c[p] ** FOLDS["adamw"].lr
                copied.append({**g, "params": [p], "lr": lr, "initial_lr": lr})
        train(one, [MAKE[optimizer](plan.param_groups(one))], 20)
        train(two, [MAKE[optimizer](copied)], 20)
        assert distance(one, two, folded) > 1e-2, optimizer


def updated(plan: mue.Plan, make: Callable[[list[dict[str, Any]]], list[Optimizer]], steps: int) -> float:
    """The distance of both forms after updates with the same gradients, which one has times c.

    Gradients are given and not computed: those of two models are products of different numbers, equal but for rounding.
    """
    one, two, folded = twins(plan)
    c = coefficients(folded, two)
    optimizers = [(make(p.param_groups(m)), m) for p, m in ((plan, one), (folded, two))]
    noise = torch.Generator().manual_seed(1)
    for step in range(steps):
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            q.grad = 0.1 * torch.randn(q.shape, generator=noise)
            p.grad = q.grad * c[q]
        for own, _ in optimizers:
            for optimizer in own:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * (1 - step / 200)
                optimizer.step()
    return distance(one, two, folded)


def test_bitwise_in_float32_for_powers_of_two() -> None:
    """Every rounding of an update is the same; of whole trainings, what is not rounding is the same."""
    torch.set_default_dtype(torch.float32)
    adamw = lambda groups: [torch.optim.AdamW(groups)]  # noqa: E731
    base = mue.Dense(width=4, ffn=4, layers=1, **SIZES)
    target = mue.MoE.parse("8e2a", width=8, expert=8, layers=2, **SIZES)
    plan = mue.transfer(base, target, TUNED)
    one, two, folded = twins(plan)
    assert sorted(set(coefficients(folded, two).values())) == [0.5, 1.0]  # residual 1/2, head 1/2, A·R·1/2 = 1/2
    assert updated(plan, adamw, 100) == 0.0
    assert 0 < updated(planned("adamw"), adamw, 100) < 1e-4  # control: with another c it is close, not equal
    train(one, adamw(plan.param_groups(one)), 100)
    train(two, adamw(folded.param_groups(two)), 100)
    bound = rounding(
        torch.float32, 2 * OPERATIONS
    )  # one step forward and back: with its large eps AdamW enlarges nothing
    assert distance(one, two, folded) <= bound
    one, two, folded = twins(plan)
    with torch.no_grad():
        two.layers[0].o.weight.mul_(1.01)  # type: ignore[union-attr]  # control: one multiplier off by 1 %
    train(one, adamw(plan.param_groups(one)), 100)
    train(two, adamw(folded.param_groups(two)), 100)
    assert distance(one, two, folded) > bound


def muon_pair(groups: list[dict[str, Any]]) -> list[Optimizer]:
    """torch's own Muon for the matrices, AdamW for the rest."""
    drop = ("algorithm", "betas", "eps", "roles")
    matrices = [{k: v for k, v in g.items() if k not in drop} for g in groups if g["algorithm"] == "muon"]
    rest = [g for g in groups if g["algorithm"] == "adamw"]
    return [torch.optim.Muon(matrices), torch.optim.AdamW(rest)]  # type: ignore[list-item]


def test_torch_muon_is_exact_for_powers_of_two_only() -> None:
    """Its iteration runs in bf16 (conventions 7): with powers of two it starts from the same bits in both forms."""
    torch.set_default_dtype(torch.float32)
    base, tuned = mue.Dense(width=4, ffn=4, layers=1, **SIZES), TUNED.replace(optimizer="muon")
    exactly, roughly = (
        mue.transfer(base, target, tuned)
        for target in (
            mue.Dense(width=8, ffn=16, layers=2, **SIZES),
            mue.Dense(width=12, ffn=20, layers=3, **SIZES),
        )
    )
    assert updated(exactly, muon_pair, 60) == 0.0
    assert updated(roughly, muon_pair, 60) > 1e-4


# ---- clipping --------------------------------------------------------------------------------------------------------


def clipped(plan: mue.Plan, clip: Callable[[Decoder], Tensor], model: Decoder, steps: int = 120) -> int:
    """Trains with a clip; returns how many steps it acted on."""
    acted = 0

    def act() -> Tensor:
        nonlocal acted
        norm = clip(model)
        acted += bool(norm > LIMIT)
        return norm

    train(model, [torch.optim.AdamW(plan.param_groups(model))], steps, clip=act)
    return acted


LIMIT = 0.25


def test_clipping_commutes_under_the_weighted_norm_only() -> None:
    plan = planned("adamw")
    one, two, folded = twins(plan)
    acted = clipped(plan, lambda m: plain_clip(m.parameters(), LIMIT), one)
    c = coefficients(folded, two)
    assert clipped(folded, lambda m: clip_grad_norm_(m.parameters(), LIMIT, coefficients=c), two) == acted
    assert distance(one, two, folded) < 1e-12
    assert acted > 20, "the clip must act"
    one, two, folded = twins(plan)  # control: the plain norm clips another training
    clipped(plan, lambda m: plain_clip(m.parameters(), LIMIT), one, 60)
    clipped(folded, lambda m: plain_clip(m.parameters(), LIMIT), two, 60)
    assert distance(one, two, folded) > 1e-3


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_without_coefficients_it_is_torchs(norm_type: float) -> None:
    x, y = (torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2))
    unused = torch.nn.Parameter(torch.zeros(2))
    for limit in (0.1, 100.0):
        for p in (x, y):
            p.grad = torch.arange(12.0).view(3, 4) - 5
        ours = clip_grad_norm_(iter([x, y, unused]), limit, norm_type)
        found = [p.grad.clone() for p in (x, y)]
        for p in (x, y):
            p.grad = torch.arange(12.0).view(3, 4) - 5
        theirs = plain_clip([x, y, unused], limit, norm_type)
        assert close(ours, theirs, operations=24)
        for one, p in zip(found, (x, y), strict=True):
            assert close(one, p.grad, operations=24)
            assert not close(one, 1.01 * p.grad, operations=24)  # negative control
    assert clip_grad_norm_([], 1.0) == 0
    x.grad = torch.full((3, 4), float("nan"))
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        clip_grad_norm_(x, 1.0, error_if_nonfinite=True)


def test_agc_threshold_and_floor() -> None:
    """Clipped unit by unit, both forms clip the same: threshold/c², floor·c; threshold·c would not."""
    g, w, threshold, floor = torch.randn(50), torch.randn(50) * 0.1, 0.02, 0.05

    def clip(g: Tensor, w: Tensor, threshold: float, floor: float) -> Tensor:
        limit = threshold * w.abs().clamp_min(floor)
        return torch.where(g.abs() > limit, limit * g.sign(), g)

    for c in (0.37, 8 / 9, 3.0):
        expected = clip(g, w, threshold, floor)
        t, f = agc(threshold, floor, c)
        assert close(clip(g / c, w * c, t, f) * c, expected, operations=10)
        assert not close(clip(g / c, w * c, threshold * c, floor * c) * c, expected, operations=10)


# ---- in mid-training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw-amsgrad", "nadamw", "sgd", "muon", "adafactor"])
def test_conversion_in_mid_training_both_ways(optimizer: str) -> None:
    """40 steps as planned, 40 folded, 40 as planned again, against 120 in one form."""
    plan = planned(optimizer)
    straight, one = model_of(plan), model_of(plan)
    train(straight, [MAKE[optimizer](plan.param_groups(straight))], 120)

    folded = fold(plan)
    first = MAKE[optimizer](plan.param_groups(one))
    train(one, [first], 40)
    two = Decoder(plan.target, folded.multipliers)
    second = MAKE[optimizer](folded.param_groups(two))
    convert(one, plan, two, folded, first, second)
    assert second.param_groups[0]["lr"] == pytest.approx(second.param_groups[0]["initial_lr"] * (1 - 39 / 200))
    train(two, [second], 40, start=40)
    three = Decoder(plan.target, plan.multipliers)
    third = MAKE[optimizer](plan.param_groups(three))
    convert(two, folded, three, plan, second, third)
    train(three, [third], 40, start=80)
    assert distance(straight, three, plan) < 1e-12


def test_control_conversion_without_the_state() -> None:
    plan = planned("adamw")
    one, folded = model_of(plan), fold(plan)
    first = torch.optim.AdamW(plan.param_groups(one))
    train(one, [first], 50)
    two = Decoder(plan.target, folded.multipliers)
    second = torch.optim.AdamW(folded.param_groups(two))
    convert(one, plan, two, folded)
    train(one, [first], 20, start=50)
    train(two, [second], 20, start=50)
    assert distance(one, two, folded) > 1e-3


def test_from_r_in_the_weights_to_r_in_the_model() -> None:
    plan = planned("adamw")
    one, two, weights = twins(plan)
    engine = fold(plan, "model")
    assert engine.route_scale == 2 and weights.route_scale == 1
    three = Decoder(plan.target, engine.multipliers)
    convert(two, weights, three, engine)
    x = tokens()
    assert close(two(x), one(x), operations=OPERATIONS) and close(three(x), one(x), operations=OPERATIONS)
    train(one, [torch.optim.AdamW(plan.param_groups(one))], 50)
    train(three, [torch.optim.AdamW(engine.param_groups(three))], 50)
    assert distance(one, three, engine) < 1e-12
    both = Decoder(plan.target, replace(engine.multipliers))  # control: R in both places is another model
    both.load_state_dict(two.state_dict())
    assert not close(both(x), one(x), operations=OPERATIONS)


def test_conversion_refuses_what_it_does_not_know() -> None:
    plan = planned("adamw")
    one, two, folded = twins(plan)
    with pytest.raises(ValueError, match="are not two forms of one plan"):
        convert(one, plan, two, fold(plan.scaled(2)))
    first, second = (torch.optim.AdamW(p.param_groups(m)) for p, m in ((plan, one), (folded, two)))
    train(one, [first], 1)
    state = next(iter(first.state.values()))
    state["prodigy_d"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"'prodigy_d' is not in mue\.fold\.FOLDS"):
        convert(one, plan, two, folded, first, second)
    del state["prodigy_d"]
    with pytest.raises(ValueError, match="in no optimizer of the target"):
        convert(one, plan, two, folded, first, torch.optim.AdamW(folded.param_groups(two)[:1]))


# ---- tied embeddings, plans, refusals --------------------------------------------------------------------------------


def test_tied_embeddings_fold_into_the_final_norm() -> None:
    plan = mue.transfer(replace(BASE, tied=True), replace(MOE, tied=True), TUNED)
    one, two, folded = twins(plan)
    assert (
        folded.roles["final_norm"].constant == pytest.approx(1 / 3)
        and folded.roles["head"].values == plan.roles["head"].values
    )
    assert folded.roles["final_norm"].values.eps == pytest.approx(TUNED.eps)  # conventions 3: 1/s once folded
    train(one, [torch.optim.AdamW(plan.param_groups(one))], 80)
    train(two, [torch.optim.AdamW(folded.param_groups(two))], 80)
    assert distance(one, two, folded) < 1e-12
    fresh = Decoder(plan.target, folded.multipliers)
    folded.init_(fresh)
    assert torch.equal(fresh.norm.weight, torch.full((12,), 1 / 3))


def test_a_final_norm_that_multiplies_by_one_plus_w() -> None:
    plan = mue.transfer(replace(BASE, tied=True), replace(MOE, tied=True), TUNED)
    one, folded = model_of(plan), fold(plan)
    two = Decoder(plan.target, folded.multipliers)
    with torch.no_grad():
        one.norm.weight.fill_(0.25)  # means a gain of 1.25
    convert(one, plan, two, folded, gain_offset=1.0)
    assert torch.allclose(two.norm.weight, torch.tensor(1.25 / 3 - 1))


def test_init_is_folded_too() -> None:
    plan = planned("adamw")
    one, folded = model_of(plan), fold(plan)
    two = Decoder(plan.target, folded.multipliers)
    folded.init_(two)
    assert distance(one, two, folded) < 1e-15
    assert close(two(tokens()), one(tokens()), operations=OPERATIONS)
    with torch.no_grad():
        two.layers[0].experts.down.mul_(1.01)  # type: ignore[union-attr]  # negative control: one multiplier off by 1 %
    assert not close(two(tokens()), one(tokens()), operations=OPERATIONS)


def test_a_folded_plan_is_a_plan(tmp_path: Any) -> None:
    plan = planned("adamw")
    folded = fold(plan)
    assert unfold(folded) == plan and unfold(plan) is plan and fold(folded) is folded and folded != plan
    assert folded.to_dict()["folded"]["route"] == "weights" and plan.to_dict()["folded"] is None
    folded.save(tmp_path / "plan.json")
    assert mue.Plan.load(tmp_path / "plan.json") == folded
    assert "multipliers are in the weights" in str(folded) and "conventions 7" in folded.roles["expert_down"].source
    assert folded.scaled(2) == fold(plan.scaled(2)) != folded
    for role in ("ffn_down", "router", "norm", "embedding"):
        assert folded.roles[role].values == plan.roles[role].values
    with pytest.raises(ValueError, match="unfold it first"):
        fold(folded, "model")
    with pytest.raises(ValueError, match="route must be one of"):
        fold(plan, "both")
    with pytest.raises(ValueError, match=r"transfer from mue.fold.unfold"):
        mue.transfer(folded, MOE)
    with pytest.raises(ValueError, match="no fold is known for optimizer 'prodigy'"):
        fold_numbers("prodigy", 0.5, 1.0)


@pytest.mark.parametrize("star", [1.0, 0.5, 3.0])
def test_folding_and_transfer_commute(star: float) -> None:
    """Conventions 12: fold the base and transfer as stock, or transfer and fold: the same numbers, for any A*."""
    base = replace(BASE, output_multiplier=star)
    direct = fold(mue.transfer(base, MOE, TUNED))
    down = {
        "init_std": TUNED.init_std * star,
        "lr": TUNED.lr * star,
        "weight_decay": TUNED.weight_decay / star,
        "eps": TUNED.eps / star,
    }
    stock = fold(mue.transfer(BASE, MOE, TUNED.replace(roles={"ffn_down": down})))
    for role in (r for r, planned in direct.roles.items() if planned.count):
        for (name, x), (_, y) in zip(direct.roles[role].values.items(), stock.roles[role].values.items(), strict=True):
            assert x == (None if y is None else pytest.approx(y, rel=1e-12)), (role, name)
    if star != 1:  # control: a folded base that keeps its old rates is another training
        kept = fold(mue.transfer(BASE, MOE, TUNED))
        assert kept.roles["expert_down"].values.lr != pytest.approx(direct.roles["expert_down"].values.lr, rel=1e-3)


def test_the_worked_example_folded() -> None:
    """Transfer-rules 10: folded numbers of both fixtures, to six digits."""
    base, target = mue.Dense(width=128, ffn=128, layers=8), mue.MoE.parse("128e8a1s", width=1024, expert=1024, layers=8)
    runs: dict[str, Any] = {"base_training": mue.Training(2**19, 25_000), "training": mue.Training(2**19, 100_000)}
    lm, df = mue.HParams(1e-3, 0.1, 0.01), mue.HParams(4.52e-3, 0.02, 0.02)
    expected = {
        ("lm", "constant-product"): {
            "expert_down": (0.00942809, 5.55556e-5, 0.45),
            "shared_down": (0.00117851, 6.94444e-6, 3.6),
            "head": (1.25e-3, 6.25e-5, None),
        },
        ("lm", "none"): {
            "expert_down": (0.00942809, 5.55556e-5, 0.05625),
            "shared_down": (0.00117851, 6.94444e-6, 0.45),
        },
        ("df", "constant-product"): {
            "expert_down": (0.0188562, 2.51111e-4, 0.09),
            "shared_down": (0.00235702, 3.13889e-5, 0.72),
            "head": (2.5e-3, 2.825e-4, None),
        },
        ("df", "none"): {
            "expert_down": (0.0188562, 2.51111e-4, 0.01125),
            "shared_down": (0.00235702, 3.13889e-5, 0.09),
        },
    }
    for (which, mode), rows in expected.items():
        plan = fold(mue.transfer(base, target, lm if which == "lm" else df, weight_decay_width=mode, **runs))
        for role, (std, lr, wd) in rows.items():
            v = plan.roles[role].values
            assert (v.init_std, v.lr) == pytest.approx((std, lr), rel=3e-6), (which, mode, role)
            assert wd is None or v.weight_decay == pytest.approx(wd, rel=1e-9), (which, mode, role)
    for tuned, std, lr in ((lm, 4.41942e-4, 7.8125e-6), (df, 8.83883e-4, 3.53125e-5)):
        head = fold(mue.transfer(base, target, tuned, rule="complete-mue-paper", **runs)).roles["head"].values
        assert (head.init_std, head.lr) == pytest.approx((std, lr), rel=2e-6)


def test_a_bias_without_a_weight_beside_it_is_refused() -> None:
    class Odd(Decoder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.layers[0].lonely_bias = torch.nn.Parameter(torch.zeros(12))

        def layout(self) -> Any:
            return [*super().layout(), mue.Layout("layers.*.lonely_bias", "bias", ("vector",))]

    plan = planned("adamw")
    folded = fold(plan)
    plan.param_groups(Odd(plan.target, plan.multipliers))  # where nothing is folded it may be
    with pytest.raises(ValueError, match="lonely_bias is a bias, but no weight"):
        folded.param_groups(Odd(plan.target, folded.multipliers))


def test_a_folded_plan_is_not_a_model_with_multipliers() -> None:
    plan = planned("adamw")
    with pytest.raises(ValueError, match="multiplier is"):
        fold(plan).param_groups(Decoder(plan.target, plan.multipliers))
    with pytest.raises(ValueError, match="multiplier is"):
        plan.param_groups(Decoder(plan.target, fold(plan).multipliers))
