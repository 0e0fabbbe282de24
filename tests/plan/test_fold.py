"""A folded plan: its numbers, its init, what it says of itself, what commutes with it, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mue
from mue.fold import fold, fold_numbers, unfold
from support.fold_model import Decoder, tokens, train
from support.fold_plans import BASE, MOE, OPERATIONS, TUNED, distance, model_of, planned, twins
from support.precision import close
from support.sde import SDE

pytestmark = pytest.mark.usefixtures("in_float64")


def test_tied_embeddings_fold_into_the_final_norm() -> None:
    plan = mue.transfer(replace(BASE, tied=True), replace(MOE, tied=True), TUNED)
    one, two, folded = twins(plan)
    assert (
        folded.roles["final_norm"].constant == pytest.approx(1 / 3)
        and folded.roles["head"].values == plan.roles["head"].values
    )
    assert folded.roles["final_norm"].values.eps == pytest.approx(TUNED.eps)  # 1/s once folded
    train(one, [torch.optim.AdamW(plan.param_groups(one))], 80)
    train(two, [torch.optim.AdamW(folded.param_groups(two))], 80)
    assert distance(one, two, folded) < 1e-12
    fresh = Decoder(plan.target, folded.multipliers)
    folded.init_(fresh)
    assert torch.equal(fresh.norm.weight, torch.full((12,), 1 / 3))


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
    assert "multipliers are in the weights" in str(folded) and "docs/why/fold.md" in folded.roles["expert_down"].source
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
    for role in (r for r, row in direct.roles.items() if row.count):
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
        plan = fold(mue.transfer(base, target, lm if which == "lm" else df, weight_decay_width=mode, **runs, **SDE))
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
