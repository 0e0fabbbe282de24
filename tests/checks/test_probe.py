"""Steps along designed gradients leave everything as it was, and right optimizers are right over seeds."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from mue.checks.context import Context
from mue.checks.training_step import undone
from mue.model.apply import groups_of
from support.wiring.case import OURS, case
from support.wiring.muons import STEPS, Masters, OwnMuon, chain, own, right_optimizers

HF = importlib.util.find_spec("transformers") is not None
FAMILIES = (
    (*OURS, "qwen3", "mixtral", "gpt2", "bloom") if HF else tuple(OURS)
)  # bloom: q, k and v in turns, head by head


def no_alarm(family: str, seed: int) -> None:
    for name, report in right_optimizers(family, seed):
        assert report.ok and not report.warnings, (family, seed, name, report)


@pytest.mark.parametrize("family", FAMILIES)
def test_right_optimizers_raise_no_alarm(family: str) -> None:
    no_alarm(family, 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_right_optimizers_over_seeds(family: str) -> None:
    for seed in range(20):
        no_alarm(family, seed)


def test_nothing_is_left_behind() -> None:
    """Weights, gradients, states and masters beside the states: another check, and a step, find what was there before."""
    c = case("mue hybrid", muon=True)
    c.optimizer, c.scheduler = Masters(groups_of(c.plan, c.model), own), None  # type: ignore[assignment]
    held = [t for pair in c.optimizer.pairs for t in pair]  # type: ignore[attr-defined]
    before = [t.detach().clone() for t in held]
    assert c.check(only=[*STEPS, "moved"]).ok
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    assert not c.optimizer.state and all(t.grad is None for t in c.model.parameters())
    context = Context(c.model, c.plan, c.batch, [c.optimizer])
    with undone(context, [c.optimizer]):  # the control: a step does change them
        for p, _ in c.optimizer.pairs:  # type: ignore[attr-defined]
            p.grad = torch.ones_like(p)
        c.optimizer.step()
        assert not all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_an_optimizer_that_has_begun_is_left_out() -> None:
    """Momentum moves what has no gradient, so that the checks of its steps say that they did not look."""
    for muon in (False, True):
        c = case("mue dense, tied", muon=muon)
        c.scheduler = None
        for p in c.model.parameters():
            p.grad = torch.ones_like(p)
        c.optimizer.step()
        report = c.check(only=STEPS)
        assert report.ok and {f.measured for f in report.findings if f.status == "left out"} == {
            "it moves without a gradient: by a state that it has already, or a decay that joins the gradient"
        }, report


def test_a_convention_that_torch_does_not_know_is_named() -> None:
    """torch.optim.Muon of 2.13 takes spectral_unclamped in a group, and scales by 1."""
    c = case("mue dense, tied", muon=True)
    c.plan = c.plan.retuned(update_scale="spectral")
    c.optimizer, c.scheduler = chain(groups_of(c.plan, c.model)), None  # type: ignore[assignment]
    found = c.check(only=STEPS).failures
    assert [f.check for f in found] == ["update scale"] and "by 1, whatever the shape" in found[0].causes[0], found


@pytest.mark.parametrize(
    ("steps", "named"), [(0, "no orthogonalisation"), (1, "about 1"), (2, "about 2"), (3, "about 3"), (4, "about 4")]
)
def test_how_many_iterations_there_were_is_said(steps: int, named: str) -> None:
    c = case("mue dense, tied", muon=True)
    c.optimizer, c.scheduler = own(groups_of(c.plan, c.model), steps=steps), None
    found = c.check(only=["orthogonalisation"]).failures
    assert len(found) == 1 and found[0].causes[0].startswith(named), found


def test_low_precision_is_looked_at_through_masters_alone() -> None:
    """A step of bfloat16 weights is rounded; where nothing keeps it, the checks say that they did not look."""
    c = case("mue dense, tied", muon=True).low()
    c.optimizer, c.scheduler = own(groups_of(c.plan, c.model)), None
    report = c.check(only=["update scale", "weight decay"])
    assert {f.measured for f in report.findings} == {
        "weights in low precision alone: a step of known size is rounded in them"
    }


def test_what_low_precision_leaves_out_is_counted() -> None:
    c = case("mue dense, tied", muon=True)
    gains = [p for p in c.model.parameters() if p.dim() < 2]
    for low in (False, True):  # the first is the control
        for p in gains if low else ():
            p.data = p.data.bfloat16()
        c.optimizer, c.scheduler = own(groups_of(c.plan, c.model)), None
        report = c.check(only=STEPS[1:])
        text = f"; {len(gains)} in low precision not looked at"
        assert {f.status for f in report.findings} == {"pass"} and len(report.findings) == 5, report
        assert all(f.measured.endswith(text) is low for f in report.findings), report


def test_what_moved_nothing_by_muon_is_left_out() -> None:
    """By a step that does nothing, and by groups that Muon's tensors are not in."""
    c = case("mue dense, tied", muon=True)
    c.scheduler = None
    groups = groups_of(c.plan, c.model)
    idle = own(groups)
    idle.step = lambda: None  # type: ignore[method-assign, assignment]
    of_muon = ("orthogonalisation", "momentum", "update scale")
    for optimizer, said in (
        (idle, {"no tensor moved by Muon"}),
        (own([g for g in groups if g["algorithm"] == "adamw"]), {"no tensor moved by Muon"}),
        (own(groups), set()),
    ):
        c.optimizer = optimizer
        found = c.check(only=of_muon).findings
        assert {f.measured for f in found if f.status == "left out"} == said and len(found) == 3, found
        assert {f.status for f in found} == ({"left out"} if said else {"pass"}), found


def test_a_decay_behind_stale_copies_alone_is_left_out() -> None:
    c = case("mue dense, tied")
    c.optimizer, c.scheduler = Masters(c.plan.param_groups(c.model), own), None  # type: ignore[assignment]
    for stale, statuses in ((False, ["pass", "pass"]), (True, ["fail", "left out"])):
        for p, _ in c.optimizer.pairs if stale else ():  # type: ignore[attr-defined]
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        assert [f.status for f in c.check(only=["stale copies", "weight decay"]).findings] == statuses


def test_what_divides_by_a_gradient_of_zero_is_no_fault() -> None:
    """It has no decay that could be told, and the rest is looked at."""

    class Bare(OwnMuon):
        def orthogonalize(self, x, steps):  # type: ignore[no-untyped-def, override]
            x = x / x.norm()
            for _ in range(8):
                x = 1.5 * x - 0.5 * x @ x.mT @ x if x.size(-2) <= x.size(-1) else 1.5 * x - 0.5 * x @ (x.mT @ x)
            return x

    c = case("mue dense, tied", muon=True)
    c.optimizer, c.scheduler = Bare(groups_of(c.plan, c.model)), None
    report = c.check(only=STEPS)
    named = {f.check for f in report.failures}
    # eight cubic steps multiply a weak direction by 25: too few, and nothing else is wrong
    assert named == {"orthogonalisation"}, report
    decay = next(f for f in report.findings if f.check == "weight decay")
    assert decay.status == "pass" and "move without a gradient" in decay.measured
