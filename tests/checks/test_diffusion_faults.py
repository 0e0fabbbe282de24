"""`mue.check` on diffusion transformers: right ones raise no alarm, and each seeded fault is caught and named by who is meant to."""

from __future__ import annotations

import re

import pytest
import torch

from mue.checks.branches import branches
from mue.checks.subjects import samples
from support.wiring.diffusion import FAULTS, SHAPES, case

torch.set_num_threads(1)


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("trained", [0, 3])
def test_right_models_raise_no_alarm(shape: str, trained: int) -> None:
    """At init, where every branch is 0 behind its gate, and after three steps, where none is."""
    c = case(shape)
    for _ in range(trained):
        c.optimizer.zero_grad()
        c.model(*c.batch).loss.backward()
        c.optimizer.step()
    report = c.check(skip=["init"] if trained else [])
    assert not report.failures and not report.warnings, report
    passed = {f.check for f in report.findings if f.status == "pass"}
    assert passed >= {"modulation", "samples", "multipliers", "attention scale", "moved", "groups"}, report


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_is_named(name: str) -> None:
    fault = FAULTS[name]
    c = case(fault.shape)
    fault.apply(c)
    report = c.check(only=fault.check.split(", "))
    assert any(re.search(fault.where, f.where) for f in report.failures), report


@pytest.mark.parametrize("seen", [0, -1, None])
def test_branches_that_are_not_seen_in_half_the_batch_are_said(
    seen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "branches", lambda record: branches(record)[:seen])
    (found,) = case("hybrid").check(only=["samples"]).findings
    assert found.status == ("pass" if seen is None else "left out") and "branches" in found.measured, found


def test_there_are_as_many_faults_as_asked_for() -> None:
    assert len(FAULTS) >= 12 and {f.check.split(",")[0] for f in FAULTS.values()} >= {"modulation", "samples", "init"}


def test_the_init_is_seen_before_the_gate() -> None:
    """Behind it every branch is 0, so that multipliers that are wrong by any factor would pass: the control."""
    c = case("hybrid")
    with torch.no_grad():
        after = [b.added.term.gate * b.added.term.value for b in _branches(c)]
        before = [b.out for b in _branches(c)]
    assert all(not t.any() for t in after) and all(float(t.square().mean()) > 1e-6 for t in before)


def _branches(c):  # type: ignore[no-untyped-def]
    from mue.checks.context import Context

    return Context(c.model, c.plan, c.batch).branches
