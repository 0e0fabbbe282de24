"""A study's measures on rows whose truth is known."""

from __future__ import annotations

import math
import random

import pytest

from mue.lab.study.measure import compare, measure
from mue.lab.study.schedule import Planned, Schedule
from mue.lab.study.spec import octave
from mue.lab.study.speed_up import speed_ups
from support.study import DATA, STUDY, study, trained

# approach → (where its minimum lies in octaves from the transferred rate, the loss there)
TRUTH = {"complete-mue": (0.2, 2.00), "standard": (-1.0, 2.05), "step-law": (0.0, 2.2), "mup": (0.0, 2.0)}
TRUTH |= {"twin": TRUTH["standard"], "self": TRUTH["complete-mue"]}


def loss(p: Planned, noise: float = 0.002) -> float:
    """A valley of 0.1 nats an octave², noise of the seed that all share, and a little of each run's own."""
    minimum, depth = (0.0, 2.0) if p.cell.target.name == "base" else TRUTH[p.cell.approach.name]
    shared = random.Random(p.seed).gauss(0, 5 * noise)
    return depth + 0.1 * (octave(p.multiplier) - minimum) ** 2 + shared + random.Random(p.run.key).gauss(0, noise)


def found(seeds: str = "seeds = [0, 1, 2, 3]") -> tuple[Schedule, dict[str, dict[str, object]]]:
    schedule = Schedule(study(**{"seeds = [0, 1]": seeds}), DATA)
    return schedule, trained(schedule, loss)


def test_drift_regret_and_attained_loss_are_those_of_the_valley() -> None:
    schedule, rows = found()
    by = {(m.cell.target.name, m.cell.approach.name): m for m in measure(schedule, rows)}
    for approach in ("complete-mue", "standard"):
        minimum, depth = TRUTH[approach]
        m = by["width 64, ffn 64", approach]
        assert m.drift and m.regret and m.attained and m.bracketed
        assert m.drift.low <= minimum <= m.drift.high and m.drift.half_width < 0.5
        assert m.drift.value == pytest.approx(minimum, abs=0.15)
        assert m.regret.value == pytest.approx(0.1 * minimum**2, abs=0.01)
        assert m.attained.value == pytest.approx(depth, abs=0.02)
        # 0.1 nats while the steps grow e-fold: a regret of x nats is worth exp(x / 0.1) - 1 of the steps
        assert m.regret_steps == pytest.approx(100 * math.expm1(m.regret.value / 0.1), rel=1e-6)
    law = by["width 64, ffn 64", "step-law"]
    assert law.drift is None and law.mean == pytest.approx(2.2, abs=0.02)
    refused = by["moe 4e2a, expert 32", "mup"]
    assert refused.mean is None and refused.planned == 0


def test_approaches_are_compared_seed_by_seed() -> None:
    schedule, rows = found()
    compared = {(c.target, c.approach): c.difference for c in compare(measure(schedule, rows), "complete-mue")}
    difference = compared["width 64, ffn 64", "standard"]
    truth = 2.05 + 0.1 - (2.0 + 0.1 * 0.04)
    assert difference.low <= truth <= difference.high
    assert difference.half_width < 0.01  # though the seeds' own spread is 0.01: it is common to both


def test_the_mean_over_targets_is_surer_than_each_and_shared_runs_count_once() -> None:
    text = STUDY.replace(
        "targets = [{ width = 64, ffn = 64,",
        'targets = [{ width = 96, ffn = 96, approaches = ["complete-mue", "standard"] }, { width = 64, ffn = 64,',
    )
    # an approach by another name, with the values and so the runs of standard; and one with those of the reference
    text = text.replace(
        "[approaches.mup]",
        '[approaches.twin]\nrule = "standard"\n[approaches.self]\nrule = "complete-mue"\n[approaches.mup]',
    )
    twins = text.replace('["complete-mue", "standard"]', '["complete-mue", "standard", "twin", "self"]')
    found = {}
    for name, each in (("alone", text), ("twins", twins)):
        schedule = Schedule(study(each), DATA)
        found[name] = {
            (c.target, c.approach): c for c in compare(measure(schedule, trained(schedule, loss)), "complete-mue")
        }
    both = found["alone"]["2 targets", "standard"]
    each = [found["alone"][t, "standard"] for t in ("width 96, ffn 96", "width 64, ffn 64")]
    assert both.targets == 2 and both.seeds == 4
    assert both.difference.value == pytest.approx(sum(c.difference.value for c in each) / 2)
    assert both.difference.half_width == pytest.approx(each[0].difference.half_width / math.sqrt(2))
    again = found["twins"]["width 96, ffn 96", "standard"].difference
    assert again.half_width == pytest.approx(each[0].difference.half_width)
    assert found["twins"]["width 96, ffn 96", "twin"].difference == again
    assert found["twins"]["width 96, ffn 96", "self"].difference.to_list() == [0, 0, 0]


def test_without_pairs_nothing_is_claimed() -> None:
    schedule, rows = found("seeds = [0]")
    assert compare(measure(schedule, rows), "complete-mue") == []


def test_a_diverged_seed_is_no_number_and_no_comparison() -> None:
    schedule = Schedule(study(), DATA)
    rows = trained(
        schedule,
        lambda p: None if p.cell.approach.name == "standard" and p.cell.target.name != "base" and p.seed else loss(p),
    )
    by = {(m.cell.target.name, m.cell.approach.name): m for m in measure(schedule, rows)}
    standard = by["width 64, ffn 64", "standard"]
    assert standard.mean == math.inf
    assert not [c for c in compare(list(by.values()), "complete-mue") if c.approach == "standard"]


def test_a_speed_up_is_read_where_the_curves_meet() -> None:
    spec = study(
        **{'targets = [{ moe = "4e2a", expert = 32 }]': 'targets = [{ moe = "4e2a", expert = 32 }, { ffn = 64 }]'}
    )
    schedule = Schedule(spec, DATA)
    rows = trained(schedule, loss)
    for cell in schedule.cells:
        if cell.plan is None or cell.target.axis != "experts":
            continue
        gain = 2.0 if "moe" in cell.target.name else 1.0
        place = schedule.cells.index(cell)
        for p in schedule.runs_of(place, rows):
            steps = cell.target.training.steps
            rows[p.run.key]["curve"] = [
                [s, 3.0 - 0.2 * math.log(gain * s)] for s in (0.1 * steps, 0.3 * steps, 0.8 * steps, steps)
            ]
    (found,) = [g for g in speed_ups(measure(schedule, rows), rows) if g.dense == "ffn 64"]
    # half the steps for the same loss, each a little dearer for its router
    moe, dense = (t.shape.flops_per_token for t in spec.targets if t.name in ("moe 4e2a, expert 32", "ffn 64"))
    assert found.moe == "moe 4e2a, expert 32" and found.factors == pytest.approx([2 * dense / moe] * 2)
