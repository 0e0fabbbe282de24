"""``mue.check``: right models pass and stay what they were, what is wrong raises with its name. Seeded faults: test_mutations.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

import mue
from mue.checks import CHECKS, CheckError, Finding
from mue.checks.context import Context
from mue.checks.registry import check_of
from mue.checks.report import SHOWN, Report
from mue.lab.models.language import LanguageModel
from support.wiring.case import BASE, OURS, TUNED, case
from support.wiring.fault import broken


@pytest.mark.parametrize("family", OURS)
def test_right_models_pass_and_stay_what_they_were(family: str) -> None:
    for seed in range(3):
        c = case(family, seed)
        before = {n: t.detach().clone() for n, t in c.model.state_dict().items()}
        modes = [m.training for m in c.model.modules()]
        rates = [g["lr"] for g in c.optimizer.param_groups]
        schedule = json.dumps(c.scheduler.state_dict(), default=str)
        report = c.check()
        assert report.ok and not report.warnings, report
        assert all(torch.equal(t, before[n]) for n, t in c.model.state_dict().items())
        assert modes == [m.training for m in c.model.modules()]
        assert rates == [g["lr"] for g in c.optimizer.param_groups] and not c.optimizer.state
        assert json.dumps(c.scheduler.state_dict(), default=str) == schedule
        assert all(p.grad is None for p in c.model.parameters())


def test_it_raises_with_the_name_and_the_mend() -> None:
    c, _ = broken("router at base lr", "mue hybrid")
    with pytest.raises(CheckError, match=r"router\.weight.*: lr") as caught:
        mue.check(c.model, c.plan, c.batch, c.optimizer)
    assert isinstance(caught.value, ValueError)
    assert "mend it: optimizer = torch.optim.AdamW(plan.param_groups(model))" in str(caught.value)
    assert "likeliest cause" in str(caught.value)
    assert caught.value.report.failures


def test_a_model_of_another_size_does_not_fill_the_screen() -> None:
    """Each of its tensors is wrong: a few are printed, all are in the report."""
    shape = mue.Dense(width=64, ffn=64, layers=6, head_dim=32, sequence=16, vocab=64)
    plan = mue.transfer(BASE, shape, TUNED)
    other = LanguageModel(replace(shape, width=128, ffn=128), plan.multipliers)
    report = mue.check(other, plan, raises=False)
    failed = [f for f in report.failures if f.check == "coverage"]
    assert len(failed) > 2 * SHOWN
    for text in (str(report), str(CheckError(report))):
        assert text.count("\ncoverage: ") == SHOWN + 1
        assert f"coverage: {len(failed) - SHOWN} more, all of them in report.findings" in text
    few = Report(tuple(failed[:SHOWN]))
    assert "more, all of them" not in str(few) and str(few).count("\ncoverage: ") == SHOWN
    assert len(json.loads(report.json())["findings"]) == len(report.findings)


def test_experts_without_tokens_are_no_failure() -> None:
    shape = mue.MoE.parse("32e2a", width=64, expert=16, layers=2, head_dim=32, sequence=8, vocab=64)
    plan = mue.transfer(BASE, shape, TUNED)
    model = LanguageModel(shape, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(64, (1, 6))
    report = mue.check(model, plan, (tokens, tokens))
    text = next(f.measured for f in report.findings if f.check == "moved")
    assert re.search(r"\d+ experts got no token", text)


def test_one_active_expert_is_a_warning_about_its_router() -> None:
    shape = mue.MoE.parse("4e1a", width=64, expert=32, layers=1, head_dim=32, sequence=16, vocab=64)
    plan = mue.transfer(BASE, shape, TUNED)
    with pytest.warns(UserWarning, match="one active expert"):
        model = LanguageModel(shape, plan.multipliers)
    plan.init_(model)
    tokens = torch.randint(64, (2, 16))
    report = mue.check(model, plan, (tokens, tokens))
    assert any("router" in f.where for f in report.warnings)


def test_shapes_alone_are_checked_on_the_meta_device() -> None:
    shape = mue.MoE.parse("256e8a1s", width=7168, expert=2048, layers=61, head_dim=128, sequence=16, vocab=129_280)
    plan = mue.transfer(mue.Dense(256, 1024, 8, head_dim=128), shape, TUNED)
    with torch.device("meta"):
        model = LanguageModel(shape, plan.multipliers)
    assert sum(p.numel() for p in model.parameters()) > 6e11
    optimizer = torch.optim.AdamW(plan.param_groups(model))
    report = mue.check(model, plan, optimizer=optimizer)
    assert {f.check for f in report.findings if f.status == "pass"} >= {"coverage", "groups", "gates", "tied weights"}
    optimizer.param_groups[0]["lr"] *= 2
    model.blocks[3].moe.router.route_scale = 1.0
    found = mue.check(model, plan, optimizer=optimizer, raises=False)
    assert {f.check for f in found.failures} == {"groups", "gates"}
    assert any("blocks.3.moe.router.weight" in f.where for f in found.failures)


def test_wrapped_and_bf16_models_are_measured_too() -> None:
    c = case("mue hybrid").low()
    report = c.check(skip=["moved"])  # in bf16 some gains do not move: a finding of its own
    assert report.ok, report
    wrapper = torch.nn.Module()
    wrapper.module = case("mue hybrid").model
    wrapper.forward = lambda *args: wrapper.module(*args)  # type: ignore[method-assign]
    assert mue.check(wrapper, c.plan, c.batch).ok


def test_what_cannot_run_is_a_finding_and_not_a_crash() -> None:
    c = case("mue hybrid")
    c.batch = (torch.zeros(2, 1000, dtype=torch.long),)
    report = c.check()
    assert [f.check for f in report.failures] == ["multipliers"] and "built for 32" in report.failures[0].measured
    with pytest.raises(ValueError, match="did you mean 'groups'"):
        c.check(only=["group"])


def test_public_names() -> None:
    assert mue.check is mue.checks.check and mue.coordinate_check is mue.checks.coordinate_check
    assert len(mue.__all__) < 20


def test_a_check_from_outside_is_one_function() -> None:
    """Registered, it runs in its turn, can be asked for alone, and is left out with the reason where something is lacking."""

    def narrow(limit: int) -> Callable[[Context], Iterator[Finding]]:
        def run(ctx: Context) -> Iterator[Finding]:
            wide = [p.name for p in ctx.placed if p.role == "embedding" and p.fan_out > limit]
            yield Finding("narrow", "fail" if wide else "pass", *wide, measured=f"limit {limit}")

        return run

    c = case("mue hybrid")
    try:
        for limit, ok in ((10_000, True), (1, False)):
            CHECKS._entries.pop("narrow", None)
            check_of("narrow", needs=("roles",))(narrow(limit))
            assert list(CHECKS)[-1] == "narrow"
            report = mue.check(c.model, c.plan, only=["narrow"], raises=False)
            assert report.ok is ok and [f.check for f in report.findings] == ["narrow"]
            assert "narrow" in {f.check for f in mue.check(c.model, c.plan, raises=False).findings}
        CHECKS._entries.pop("narrow")
        check_of("narrow", needs=("roles",))(lambda ctx: iter([ctx.nothing_of_that_name]))
        (broken,) = mue.check(c.model, c.plan, only=["narrow"], raises=False).findings
        assert broken.status == "fail"  # and it says where: here, in the check, and not in the model
        assert re.search(r"AttributeError: .*nothing_of_that_name.* \(test_run\.py:\d+\)", broken.measured)
        CHECKS._entries.pop("narrow")
        check_of("narrow", needs=("roles", "batch"))(narrow(1))
        (left_out,) = mue.check(c.model, c.plan, only=["narrow"]).findings
        assert (left_out.status, left_out.measured) == ("left out", "no batch was given")
    finally:
        CHECKS._entries.pop("narrow", None)
    with pytest.raises(ValueError, match="unknown check 'narrow'"):
        mue.check(c.model, c.plan, only=["narrow"])
    with pytest.raises(ValueError, match="unknown need 'roels'; did you mean 'roles'"):
        check_of("narrow", needs=("roels",))
    with pytest.raises(ValueError, match="unknown task 'imge'; did you mean 'image'"):
        check_of("narrow", task="imge")


class TwoArguments(LanguageModel):
    """``forward(idx, targets)``, both needed."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        logits = super().forward(idx).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_a_call_that_fails_says_that_the_check_calls_the_model_itself() -> None:
    plan = mue.transfer(BASE, BASE, TUNED)
    model = TwoArguments(BASE, plan.multipliers)
    plan.init_(model)
    ids = torch.randint(BASE.vocab, (2, BASE.sequence))
    report = mue.check(model, plan, ids, loss=lambda m, x: m(x, x), raises=False)
    failed = [f for f in report.failures if "calls model(batch) itself, also where loss= is given" in f.mend]
    assert failed and all("(inputs, targets)" in f.mend and "targets" in f.measured for f in failed)
    assert not [f for f in mue.check(model, plan, (ids, ids), raises=False).failures if "TypeError" in f.measured]
