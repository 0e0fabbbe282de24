"""Right schedules pass, whatever they multiply; wrong ratios, peaks, lengths and warmups are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedules

from mue.checks import Report
from mue.checks.report import PASS, UNMEASURED, WARN
from mue.checks.schedule import leaves
from support.wiring.case import Case, case

STEPS, WARMUP = 400, 20  # the case's plan: 5 % of its steps
ONLY = ["groups", "scheduler", "moved"]
Make = Callable[[Optimizer], Any]


def peaks(optimizer: Optimizer, times: float = 1.0) -> list[float]:
    return [g["lr"] * times for g in optimizer.param_groups]


def report_of(make: Make, given: bool = True) -> Report:
    c = bare()
    scheduler = make(c.optimizer)
    c.scheduler = scheduler if given else None
    return c.check(only=ONLY)


def bare() -> Case:
    c = case("mue hybrid")
    c.optimizer, c.scheduler = torch.optim.AdamW(c.plan.param_groups(c.model)), None
    return c


def rates_of(scheduler: Any) -> list[Any]:
    """What schedulers of torch say they gave last."""
    return [s.get_last_lr() for s in leaves(scheduler) if hasattr(s, "get_last_lr")]


class Container:
    """As torchtitan's: one scheduler for each optimizer, stepped and saved as one."""

    def __init__(self, *schedulers: Any) -> None:
        self.schedulers = schedulers

    def step(self) -> None:
        for s in self.schedulers:
            s.step()

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for s in self.schedulers:
            s.last_epoch = state["last_epoch"]


class Counting:
    """Of one's own: counts its steps, and says nothing of a state."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.done, self.planned = optimizer, 0, peaks(optimizer)
        self.write()

    def write(self) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.planned, strict=True):
            group["lr"] = peak * warm(self.done)

    def step(self) -> None:
        self.done += 1
        self.write()


class Told(Counting):
    """As timm's: it is told the step."""

    def step(self, step: int) -> None:  # type: ignore[override]
        self.done = step
        self.write()


class ToldTwice(Told):
    """As timm's with ``t_in_epochs=False``: what epochs do is nothing."""

    def step(self, epoch: int) -> None:  # type: ignore[override]
        pass

    def step_update(self, step: int) -> None:
        Told.step(self, step)


def warm(step: int) -> float:
    return min(1.0, (step + 1) / WARMUP)


def by_hand(optimizer: Optimizer) -> Callable[[int], None]:
    planned = peaks(optimizer)

    def write(step: int) -> None:
        for group, peak in zip(optimizer.param_groups, planned, strict=True):
            group["lr"] = peak * warm(step)

    return write


def in_sequence(optimizer: Optimizer, steps: int = STEPS) -> Any:
    start = torch_schedules.LinearLR(optimizer, 0.01, total_iters=WARMUP)
    rest = torch_schedules.CosineAnnealingLR(optimizer, steps - WARMUP)
    return torch_schedules.SequentialLR(optimizer, [start, rest], [WARMUP])


def one_cycle(optimizer: Optimizer, steps: int = STEPS, times: float = 1.0) -> Any:
    return torch_schedules.OneCycleLR(optimizer, peaks(optimizer, times), total_steps=steps, cycle_momentum=False)


RIGHT: dict[str, Make] = {
    "one cycle, a list of peaks": one_cycle,
    "cyclic": lambda o: torch_schedules.CyclicLR(o, peaks(o, 0.1), peaks(o), step_size_up=100, cycle_momentum=False),
    "cosine": lambda o: torch_schedules.CosineAnnealingLR(o, STEPS),
    "cosine restarts": lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 100),
    "factor": lambda o: torch_schedules.LambdaLR(o, warm),
    "sequence": in_sequence,
    "chain": lambda o: torch_schedules.ChainedScheduler(
        [torch_schedules.LinearLR(o, 0.1, total_iters=WARMUP), torch_schedules.MultiStepLR(o, [240, 320])]
    ),
    "steps": lambda o: torch_schedules.StepLR(o, 100),
    "polynomial": lambda o: torch_schedules.PolynomialLR(o, STEPS),
    "container": lambda o: Container(torch_schedules.LambdaLR(o, warm)),
    "list": lambda o: [in_sequence(o)],
    "by hand": by_hand,
    "a class of one's own": Counting,
    "told the step": Told,
    "told epoch and step": ToldTwice,
}
UNWARMED = {"cosine", "cosine restarts", "steps", "polynomial"}


@pytest.mark.parametrize("name", RIGHT)
def test_right_schedules_pass_and_are_put_back(name: str) -> None:
    c = bare()
    c.scheduler = RIGHT[name](c.optimizer)
    before = [{k: v for k, v in g.items() if k != "params"} for g in c.optimizer.param_groups]
    counted, told = getattr(c.scheduler, "done", None), rates_of(c.scheduler)
    report = c.check(only=ONLY)
    assert {f.check for f in report.findings if f.status == PASS} == set(ONLY), report
    assert not report.failures, report
    assert [f.where.partition(": ")[2] for f in report.warnings] == ["warmup"] * (name in UNWARMED)
    assert before == [{k: v for k, v in g.items() if k != "params"} for g in c.optimizer.param_groups]
    assert counted == getattr(c.scheduler, "done", None) and told == rates_of(c.scheduler)


@pytest.mark.parametrize(
    "name",
    ["cosine", "linear", "constant", "polynomial", "inverse_sqrt", "wsd", "restarts", "min_lr"],
)
def test_the_schedules_of_transformers_pass(name: str) -> None:
    t = pytest.importorskip("transformers.optimization", reason="needs the hf extra")
    make: dict[str, Make] = {
        "cosine": lambda o: t.get_cosine_schedule_with_warmup(o, WARMUP, STEPS),
        "linear": lambda o: t.get_linear_schedule_with_warmup(o, WARMUP, STEPS),
        "constant": lambda o: t.get_constant_schedule_with_warmup(o, WARMUP),
        "polynomial": lambda o: t.get_polynomial_decay_schedule_with_warmup(o, WARMUP, STEPS, lr_end=0.0),
        "inverse_sqrt": lambda o: t.get_inverse_sqrt_schedule(o, WARMUP),
        "wsd": lambda o: t.get_wsd_schedule(o, WARMUP, 100, num_training_steps=STEPS),
        "restarts": lambda o: t.get_cosine_with_hard_restarts_schedule_with_warmup(o, WARMUP, STEPS, 3),
        "min_lr": lambda o: t.get_cosine_with_min_lr_schedule_with_warmup(o, WARMUP, STEPS, min_lr_rate=0.1),
    }
    report = report_of(make[name])
    assert not report.failures and not report.warnings, report


def test_a_chain_below_its_peak_is_said_and_no_fault() -> None:
    def make(o: Optimizer) -> Any:
        start = torch_schedules.LinearLR(o, 0.1, total_iters=WARMUP)
        return torch_schedules.ChainedScheduler([start, torch_schedules.ExponentialLR(o, 0.99)])

    report = report_of(make)
    assert not report.failures and "0.8179 × the planned peaks" in {f.measured for f in report.warnings}, report


def changed_by_hand(optimizer: Optimizer) -> Any:
    for g in optimizer.param_groups:
        g["lr"] *= 0.5
    return torch_schedules.LambdaLR(optimizer, warm)


WRONG: dict[str, tuple[Make, str]] = {
    "one peak for all": (
        lambda o: torch_schedules.OneCycleLR(o, 4e-3, total_steps=STEPS, cycle_momentum=False),
        "all rates are 0.00016",
    ),
    "peaks of another plan": (lambda o: one_cycle(o, times=2.0), "2 × the planned peaks"),
    "halved by hand": (changed_by_hand, "0.5 × the planned peaks"),
    "one start for all": (
        lambda o: torch_schedules.CyclicLR(o, 1e-4, peaks(o), step_size_up=100, cycle_momentum=False),
        "all rates are 0.0001",
    ),
    "one floor for all": (
        lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 100, eta_min=1e-4),
        "factors on the planned peaks",
    ),
    "returns what it should set": (lambda o: warm, "it returns a value, and no rate changes"),
    "raises": (lambda o: lambda step: 1 / 0, "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_schedules_are_named_by_this_check(name: str) -> None:
    make, measured = WRONG[name]
    report = report_of(make)
    found = [f for f in report.failures if f.check == "scheduler"]
    assert found and measured in found[0].measured, report
    assert not [f for f in report.failures if f.check == "groups"], report  # the groups are as planned


def test_a_rate_changed_by_hand_holds_and_is_seen_without_the_scheduler_too() -> None:
    """``initial_lr`` is not in the groups beforehand, so that a scheduler starts from the changed rate."""
    c = bare()
    planned = peaks(c.optimizer)
    changed_by_hand(c.optimizer)
    assert [g["initial_lr"] for g in c.optimizer.param_groups] == [p / 2 for p in planned]
    found = [f for f in c.check(only=["groups"]).findings if f.where == "lr of all groups"]
    assert found and found[0].status == UNMEASURED  # another peak, or a scheduler that rises: give it
    c = bare()
    for g in c.optimizer.param_groups:
        g["lr"] *= 0.5
    assert c.check(only=["groups"]).failures


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda o: one_cycle(o, STEPS // 10), "it is of 40 steps"),
        (lambda o: in_sequence(o, STEPS * 10), "it is of 4,000 steps"),
        (lambda o: torch_schedules.LambdaLR(o, lambda s: warm(s) * max(0.0, 1 - s / 40)), "it is over at step 40"),
        (lambda o: torch_schedules.LambdaLR(o, lambda s: warm(s) * max(0.1, 1 - s / 100)), "it is over at step 90"),
    ],
)
def test_another_length_than_the_plans_is_a_warning(make: Make, text: str) -> None:
    report = report_of(make)
    found = [f for f in report.warnings if f.where.endswith("length")]
    assert len(found) == 1 and found[0].measured.startswith(text), report
    assert not report.failures


def test_a_schedule_without_the_planned_warmup_is_a_warning() -> None:
    for make, text in (
        (lambda o: torch_schedules.CosineAnnealingLR(o, STEPS), "none"),
        (lambda o: torch_schedules.LambdaLR(o, lambda s: min(1.0, (s + 1) / 5)), "the peak is reached at step 5"),
    ):
        assert [(f.status, f.measured) for f in report_of(make).warnings] == [(WARN, text)]


def test_rates_that_are_tensors_keep_their_identity() -> None:
    """A captured graph holds on to them."""
    c = bare()
    groups = [{**g, "lr": torch.tensor(g["lr"], dtype=torch.float64)} for g in c.plan.param_groups(c.model)]
    c.optimizer = torch.optim.AdamW(groups, foreach=False)
    c.scheduler = torch_schedules.LambdaLR(c.optimizer, warm)
    rates = [(g["lr"], float(g["lr"])) for g in c.optimizer.param_groups]
    report = c.check(only=ONLY)
    assert report.ok and not report.warnings, report
    assert all(g["lr"] is r and float(r) == v for g, (r, v) in zip(c.optimizer.param_groups, rates, strict=True))


def test_a_schedule_that_has_begun_is_judged_by_what_it_multiplies() -> None:
    c = bare()
    c.scheduler = in_sequence(c.optimizer)
    for _ in range(200):
        c.optimizer.step()
        c.scheduler.step()
    report = c.check(only=ONLY)
    assert not report.failures and not report.warnings, report


def test_what_is_no_scheduler_is_refused() -> None:
    c = bare()
    for given in (torch_schedules.LambdaLR, 0.1, lambda: None):
        c.scheduler = given
        with pytest.raises(ValueError, match="scheduler= is the scheduler that was built on the optimizer"):
            c.check(only=ONLY)


def test_a_warmup_shorter_than_adams_average_is_said_beside_the_pass() -> None:
    """1/(1-β2) is 80 steps in the case's plan; a note and no fault, for somebody may have tuned it so."""

    def warmed(steps: int) -> str:
        report = report_of(lambda o: torch_schedules.LambdaLR(o, lambda t: min(1.0, (t + 1) / steps)))
        (passed,) = [f for f in report.findings if f.check == "scheduler"]
        return passed.measured

    assert warmed(12).endswith("; warmup of 12 steps, shorter than 1/(1-β2) = 80")
    assert "warmup" not in warmed(81) and "warmup" not in warmed(100)
