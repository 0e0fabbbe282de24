"""Optimizer states and schedulers in the other form: by name or by order, in any grouping, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import mue
from mue.convert.checkpoint import convert_checkpoint
from mue.fold import coefficients, fold
from support.checkpoints import K, Run, distance, how, planned
from support.precision import close

pytestmark = pytest.mark.usefixtures("in_float64")


@pytest.mark.parametrize("names", ["param_names", "keys"])
def test_optimizers_that_know_their_parameters_by_name(names: str, tmp_path: Path) -> None:
    """As torch keeps them (``param_names``) and as torch.distributed.checkpoint does (names as keys), in any grouping."""
    plan = planned()
    one = Run(plan)
    named = {p: n for n, p in one.model.named_parameters()}
    groups = []
    for g in plan.param_groups(one.model):  # one group for each parameter, in another order than the plan's
        groups += [{**g, "params": [p], "param_names": [named[p]]} for p in reversed(g["params"])]
    one.optimizer = torch.optim.AdamW(groups, amsgrad=True)
    one.scheduler = LambdaLR(one.optimizer, lambda step: 1 - step / 40)
    one.train(0, K)
    state = one.optimizer.state_dict()
    if names == "keys":
        order = [n for g in state["param_groups"] for n in g["param_names"]]
        state = {
            "state": {order[i]: s for i, s in state["state"].items()},
            "param_groups": [
                {**{k: v for k, v in g.items() if k != "param_names"}, "params": g["param_names"]}
                for g in state["param_groups"]
            ],
        }
    torch.save(state, tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", how(plan, "folded"))
    new = torch.load(tmp_path / "b.pt", weights_only=True)
    folded, two = fold(plan), Run(fold(plan))
    assert [g["lr"] for g in new["param_groups"]] == pytest.approx(
        [g["lr"] * (1 - K / 40) for g in folded.param_groups(two.model)], rel=1e-12
    )
    c = {named[p]: v for p, v in zip(named, coefficients(folded, two.model).values(), strict=True)}
    held = [n for g in new["param_groups"] for n in g["params" if names == "keys" else "param_names"]]
    assert sorted(held) == sorted(named.values())
    for n, p in one.model.named_parameters():
        moved = new["state"][n if names == "keys" else held.index(n)]["exp_avg_sq"]
        assert close(moved, one.optimizer.state[p]["exp_avg_sq"] / c[n] ** 2, operations=4)
        assert not close(
            moved, one.optimizer.state[p]["exp_avg_sq"] / (1.01 * c[n]) ** 2, operations=4
        )  # nor both zero


def test_a_run_under_one_cycle_goes_on_in_the_other_form(tmp_path: Path) -> None:
    """Its rates are the groups' own: where it starts, its peak and where it ends."""

    def cycled(plan: mue.Plan, seed: int | None = 0) -> Run:
        made = Run(plan, seed)
        made.optimizer = torch.optim.AdamW(plan.param_groups(made.model), amsgrad=True)
        peaks = [g["lr"] for g in made.optimizer.param_groups]
        made.scheduler = OneCycleLR(made.optimizer, peaks, total_steps=40, cycle_momentum=False)
        return made

    plan = planned()
    straight, one, two = cycled(plan), cycled(plan), cycled(fold(plan), None)
    straight.train(0, 2 * K)
    one.train(0, K)
    torch.save(one.state(), tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", how(plan, "folded"))
    two.load(torch.load(tmp_path / "b.pt", weights_only=True))
    two.train(K, K)
    assert distance(straight, two) < 1e-9
    two.optimizer.param_groups[0]["max_lr"] *= 2  # a control: another peak is another run
    two.train(2 * K, 3)
    straight.train(2 * K, 3)
    assert distance(straight, two) > 1e-6


def test_an_optimizer_that_is_not_the_plans_is_refused(tmp_path: Path) -> None:
    plan = planned()
    one = Run(plan)
    one.train(0, 1)

    def refused(optimizer: dict[str, Any], message: str) -> None:
        torch.save({"optimizer": optimizer}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", how(plan, "folded"))

    plain = torch.optim.AdamW(one.model.parameters(), lr=1e-3)
    refused(plain.state_dict(), "have no names, and its groups of .* are not those of plan.param_groups")
    state = one.optimizer.state_dict()
    state["param_groups"][0]["weight_decay"] = 3.0
    refused(state, r"has weight_decay = 3\.0, the plan")
    state = one.optimizer.state_dict()
    state["param_groups"][1]["lr"] /= 2  # one group at another phase; o and q part from each other when folded
    down = next(i for i, g in enumerate(state["param_groups"]) if "expert_down" in g["roles"])
    assert len(state["param_groups"][down]["params"]) > 1
    state = one.optimizer.state_dict()
    order = [i for g in state["param_groups"] for i in g["params"]]
    state["state"] = {i: state["state"][order[-1 - k]] for k, i in enumerate(order)}
    refused(state, "parameters are in another order than plan.param_groups")
    state = one.optimizer.state_dict()
    state["state"][down]["prodigy_d"] = torch.ones(())
    for s in state["state"].values():
        s["prodigy_d"] = torch.ones(())
    refused(state, r"'prodigy_d' is not in mue\.fold\.FOLDS")


def test_a_schedulers_absolute_rates_are_the_new_forms(tmp_path: Path) -> None:
    from mue.convert.optimizer import convert_scheduler

    plan = planned()
    one = Run(plan)
    one.train(0, 3)
    torch.save(one.state(), tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", how(plan, "folded"))
    new = torch.load(tmp_path / "b.pt", weights_only=True)
    groups = new["optimizer"]["param_groups"]
    assert len(groups) != len(one.optimizer.param_groups)  # the folded form parts what was one group
    assert new["scheduler"]["base_lrs"] == [g["initial_lr"] for g in groups]
    assert new["scheduler"]["_last_lr"] == [g["lr"] for g in groups]
    old = one.optimizer.param_groups
    with pytest.raises(ValueError, match="min_lrs has one entry for each group"):
        convert_scheduler({"base_lrs": [], "min_lrs": [1e-5] * len(old)}, old, groups)
