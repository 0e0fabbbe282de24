"""Another optimizer than the plan's is named, whoever wrote it; the planned one passes in every variant and wrapper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import mue
from mue.checks.report import FAIL, PASS, UNMEASURED
from mue.lab.models.language import LanguageModel
from support.wiring.case import BASE, Case, case

Groups = list[dict[str, Any]]


def with_optimizer(make: Callable[[Groups], Any], keep: tuple[str, ...] = ()) -> Case:
    c = case("mue hybrid")
    groups = c.plan.param_groups(c.model)
    c.optimizer = make([{k: v for k, v in g.items() if not keep or k in ("params", *keep)} for g in groups])
    c.scheduler = None
    return c


def class_named(name: str, **attributes: Any) -> type[Optimizer]:
    """A class of another package: only its name and its switches are known."""

    def start(self: Optimizer, groups: Groups) -> None:
        Optimizer.__init__(self, groups, {})

    return type(name, (Optimizer,), {"__init__": start, "step": lambda self: None, **attributes})


class Wrapper:
    """As accelerate's, Lightning's and DeepSpeed's: another object around the optimizer."""

    def __init__(self, optimizer: Optimizer, groups: Groups | None = None) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups if groups is None else groups
        self.state = optimizer.state

    def step(self) -> None:
        self.optimizer.step()


class Many:
    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = list(optimizers)


RIGHT: dict[str, Callable[[Groups], Any]] = {
    "fused": lambda g: torch.optim.AdamW(g, fused=True),
    "foreach": lambda g: torch.optim.AdamW(g, foreach=True),
    "one by one": lambda g: torch.optim.AdamW(g, foreach=False),
    "rates as tensors": lambda g: torch.optim.AdamW(
        [{**one, "lr": torch.tensor(one["lr"], dtype=torch.float64)} for one in g], foreach=False
    ),
    "Adam with decoupled decay": lambda g: torch.optim.Adam(g, decoupled_weight_decay=True),
    "a subclass": lambda g: type("Ours", (torch.optim.AdamW,), {})(g),
    "a wrapper": lambda g: Wrapper(torch.optim.AdamW(g)),
    "a container": lambda g: Many(torch.optim.AdamW(g[::2]), torch.optim.AdamW(g[1::2])),
    "a list of wrappers": lambda g: [Wrapper(torch.optim.AdamW(g[:3])), torch.optim.AdamW(g[3:])],
}


@pytest.mark.parametrize("name", RIGHT)
def test_the_planned_optimizer_passes_in_every_variant(name: str) -> None:
    report = with_optimizer(RIGHT[name]).check(only=["groups", "moved"])
    assert {f.check for f in report.findings if f.status == PASS} == {"groups", "moved"}, report
    assert len(report.findings) == 2, report


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("PagedAdamW8bit", {}),
        ("AdamWFp8", {}),
        ("AnyPrecisionAdamW", {}),
        ("FusedAdam", {"adam_w_mode": 1}),
        ("DeepSpeedCPUAdam", {"adam_w_mode": True}),
        ("Adam8bit", {"is_adamw": True}),
    ],
)
def test_the_planned_optimizer_passes_under_other_packages_names(name: str, attributes: dict[str, Any]) -> None:
    report = with_optimizer(class_named(name, **attributes)).check(only=["groups"])
    assert [f.status for f in report.findings] == [PASS], report


@pytest.mark.parametrize(
    "name", ["SGD", "RMSprop", "Adagrad", "Adam", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Adafactor"]
)
def test_another_optimizer_of_torch_fails_by_name(name: str) -> None:
    keep = ("lr", "weight_decay") if name != "Adam" else ()
    report = with_optimizer(getattr(torch.optim, name), keep).check(only=["groups"])
    assert [f.where.partition(":")[0] for f in report.failures] == [f"optimizer torch.optim.{name}"], report
    assert all(f.expected and f.measured and f.causes and f.mend for f in report.failures)


@pytest.mark.parametrize(
    "name",
    [
        "Lion",
        "Lion8bit",
        "PagedLion32bit",
        "DeepSpeedCPULion",
        "DecoupledLionW",
        "FusedLAMB",
        "SOAP",
        "Sophia_G",
        "Prodigy",
        "AdamWScheduleFree",
        "DecoupledAdamW",
        "DistributedShampoo",
        "StableAdamW",
    ],
)
def test_another_optimizer_of_other_packages_fails_by_name(name: str) -> None:
    report = with_optimizer(class_named(name)).check(only=["groups"])
    assert [f.where for f in report.failures] == [f"optimizer {name}"], report


@pytest.mark.parametrize("name", ["Ours", "FusedAdam", "Adam8bit"])
def test_an_unknown_optimizer_that_cannot_be_tried_is_no_pass_and_no_fault(name: str) -> None:
    """A name that says nothing, or not whether its decay joins the gradient; without a batch there is no step."""
    c = with_optimizer(class_named(name))
    c.batch = None
    found = [f for f in c.check(only=["groups"]).findings if f.where == f"optimizer {name}"]
    assert len(found) == 1 and found[0].status == UNMEASURED and "not known" in found[0].measured, found


class Loop(Optimizer):
    """AdamW written again; ``look_ahead`` is how much of the newest gradient counts beside its average."""

    decoupled, look_ahead, keeps = True, 0.0, 1.0

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                s, (b1, b2) = self.state[p], group["betas"]
                shrink = group["lr"] * group["weight_decay"]
                g = p.grad if self.decoupled else p.grad + group["weight_decay"] * p
                s["n"] = s.get("n", 0) + 1
                s["m"] = torch.lerp(s.get("m", torch.zeros_like(p)), g, 1 - b1)
                s["v"] = torch.lerp(s.get("v", torch.zeros_like(p)), g * g, 1 - b2)
                m = torch.lerp(s["m"] / (1 - b1 ** s["n"]), g, self.look_ahead)
                step = self.keeps * m / ((s["v"] / (1 - b2 ** s["n"])).sqrt() + group["eps"])
                p.mul_(1 - shrink * self.decoupled).sub_(group["lr"] * step)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, PASS),
        ({"look_ahead": 0.5}, FAIL),  # AdamW's first step, and not its second one
        ({"keeps": 0.95}, UNMEASURED),  # an approximation, or a slip: nobody knows
        ({"decoupled": False}, FAIL),  # where gradients are small, the decay is most of what joins them
    ],
)
def test_an_unknown_optimizer_is_measured_where_it_can_be(changes: dict[str, Any], status: str) -> None:
    report = with_optimizer(type("Ours", (Loop,), changes)).check(only=["groups", "moved"])
    found = [f.status for f in report.findings if f.where == "optimizer Ours"]
    assert found == [status] * (status != PASS) and report.ok is (status == PASS), report


def test_a_subclass_with_a_step_of_its_own_is_not_what_it_inherits() -> None:
    def still(self: Optimizer, closure: Any = None) -> None:
        pass

    report = with_optimizer(type("Careful", (torch.optim.AdamW,), {"step": still})).check(only=["groups"])
    assert [f.where for f in report.failures] == ["optimizer Careful"] and "100 % off" in report.failures[0].measured


@pytest.mark.parametrize("switch", ["amsgrad", "maximize"])
def test_switches_that_make_another_algorithm_fail(switch: str) -> None:
    report = with_optimizer(lambda g: torch.optim.AdamW(g, **{switch: True})).check(only=["groups"])
    assert [f.where for f in report.failures] == [f"optimizer torch.optim.AdamW: {switch}"], report


def test_an_optimizer_of_master_weights_is_not_measured() -> None:
    def masters(groups: Groups) -> Any:
        return [{**g, "params": [p.detach().clone() for p in g["params"]]} for g in groups]

    c = with_optimizer(lambda g: Wrapper(torch.optim.AdamW(masters(g))))
    report = c.check(only=["groups"])
    assert [f.where for f in report.findings] == ["optimizer Wrapper"] and report.findings[0].status == UNMEASURED
    c = with_optimizer(lambda g: torch.optim.AdamW(masters(g)))  # without a wrapper it is another model's optimizer
    assert c.check(only=["groups"]).failures


def test_each_half_of_a_muon_plan_belongs_to_its_optimizer() -> None:
    shape = mue.Dense(width=64, ffn=64, layers=2, head_dim=16, sequence=32, vocab=96)
    plan = mue.transfer(BASE, shape, mue.HParams(lr=4e-3, weight_decay=0.1, init_std=0.04, optimizer="muon"))
    model = LanguageModel(shape, plan.multipliers)
    plan.init_(model)

    def halves() -> tuple[Groups, Groups]:
        groups = plan.param_groups(model)
        return [g for g in groups if g["algorithm"] == "muon"], [g for g in groups if g["algorithm"] == "adamw"]

    muon, adamw = halves()
    pair = [torch.optim.Muon(muon), torch.optim.AdamW(adamw)]
    assert [f.status for f in mue.check(model, plan, optimizer=pair, only=["groups"]).findings] == [PASS]
    alone = torch.optim.AdamW([*muon, *adamw])
    found = mue.check(model, plan, optimizer=alone, only=["groups"], raises=False).failures
    assert len(found) == 1 and "attention.q.weight" in found[0].where and found[0].measured == "adamw", found


def test_what_is_no_optimizer_is_refused() -> None:
    c = case("mue hybrid")
    for given, text in (
        (c.plan.param_groups(c.model), "has got parameter groups"),
        (torch.optim.AdamW, "has got the class AdamW"),
        ("adamw", "has got a str"),
    ):
        with pytest.raises(ValueError, match=text):
            mue.check(c.model, c.plan, optimizer=given)  # type: ignore[arg-type]
