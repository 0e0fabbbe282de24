"""Early stopping: a run is given up only where the valley's fit does not look, and what is given up moves nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mue.lab.valley import LossPoint, fit_valley
from mue.lab.valley.pruning import RUNGS, PartialRun, hopeless, rung
from support.paths import ROOT
from valley_population import load
from valley_pruning import pruned

STEPS = 100
RECORDED = ROOT / "benchmarks/recorded"


def run(x: float, seed: int = 0, upto: int = STEPS, at: float = -7.0) -> PartialRun:
    """From 6 down to a valley that is steep beyond three octaves; small learning rates take their time."""
    d = x - at
    noise = 0.01 * float(np.random.default_rng([seed, round(8 * x) + 1000]).normal())
    end = 2.0 + 0.05 * d * d / (1 + d * d / 60) + 0.2 * max(0.0, abs(d) - 4) + noise
    pace = 6.0 * 2.0 ** min(0.0, 0.3 * d)
    full = 1 - math.exp(-pace)
    curve = [(s, 6 - (6 - end) * (1 - math.exp(-pace * s / STEPS)) / full) for s in range(5, upto + 1, 5)]
    return PartialRun(x, seed, curve, curve[-1][1] if upto == STEPS else None)


NEAR = [run(x, seed) for seed in range(3) for x in np.arange(-11.0, -3.0)]


def stopped_at(x: float, others: Sequence[PartialRun]) -> int | None:
    rungs = [math.ceil(share * STEPS / 5) * 5 for share in RUNGS]
    return next((step for step in rungs if hopeless(run(x, 5, step), others, STEPS)), None)


@pytest.mark.parametrize("x", [-1.0, 0.0])
def test_a_run_that_no_longer_matters_is_stopped(x: float) -> None:
    assert stopped_at(x, NEAR) is not None


@pytest.mark.parametrize("x", [-9.0, -8.0, -7.0, -6.0, -5.0])
def test_control_a_run_that_matters_is_not(x: float) -> None:
    assert stopped_at(x, NEAR) is None


def test_nothing_is_stopped_before_there_is_a_valley() -> None:
    assert stopped_at(0.0, []) is None and stopped_at(0.0, NEAR[:2]) is None
    assert stopped_at(0.0, [replace(s, loss=math.nan) for s in NEAR]) is None
    assert not hopeless(PartialRun(0.0, 0, []), NEAR, STEPS)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_may_have_diverged_is_left_to_the_trainer(loss: float) -> None:
    cut = run(0.0, 5, 60)
    assert hopeless(cut, NEAR, STEPS)
    assert not hopeless(replace(cut, curve=[*cut.curve, (65, loss)]), NEAR, STEPS)


@given(shift=st.floats(-5, 5), scale=st.floats(0.1, 10), x=st.sampled_from([-9.0, -7.0, -2.0, -1.0, 0.0]))
@settings(max_examples=10)
def test_the_unit_of_the_loss_does_not_matter(shift: float, scale: float, x: float) -> None:
    def other(s: PartialRun) -> PartialRun:
        loss = None if s.loss is None else scale * (s.loss + shift)
        return replace(s, curve=[(step, scale * (y + shift)) for step, y in s.curve], loss=loss)

    cut = run(x, 5, 60)
    assert hopeless(other(cut), [other(s) for s in NEAR], STEPS) == hopeless(cut, NEAR, STEPS)


def test_a_run_is_judged_once_at_each_rung() -> None:
    passed = [rung(step, STEPS) for step in range(STEPS + 1)]
    assert passed == sorted(passed) and passed[0] == 0 and passed[-1] == len(RUNGS)
    assert [step for step in range(1, STEPS + 1) if passed[step] > passed[step - 1]] == [
        round(share * STEPS) for share in RUNGS
    ]


@pytest.mark.parametrize("name", ["sweeps", "wide"])
def test_the_minimum_of_recorded_sweeps_stays_where_it_was(name: str) -> None:
    costs = []
    for number, sweep in enumerate(load(RECORDED / f"{name}.json")[1:3]):
        runs = [(row, place) for place in range(len(sweep.x)) for row in range(len(sweep.loss))]
        order = np.random.default_rng(number).permutation(len(runs))
        points, cost = pruned(sweep, [runs[i] for i in order])
        assert abs(fit_valley(points).minimum - fit_valley(sweep.points).minimum) < 0.05, sweep.name
        costs.append(cost)
    assert len(costs) == 2
    assert max(costs) < 0.95 if name == "wide" else min(costs) > 0.99


def test_control_giving_up_what_is_far_behind_moves_it() -> None:
    moved = []
    for sweep in load(RECORDED / "sweeps.json"):
        best = float(np.nanmin(sweep.loss))
        kept = [p if p.loss < best + 0.2 else LossPoint(p.log2_lr, math.inf, p.seed) for p in sweep.points]
        moved.append(abs(fit_valley(kept).minimum - fit_valley(sweep.points).minimum))
    assert max(moved) > 0.05
