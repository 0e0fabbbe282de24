"""What a study trains, and in which order."""

from __future__ import annotations

from mue.lab.study.schedule import Planned, Schedule
from mue.lab.study.spec import octave
from support.study import DATA, row, study, trained


def test_transferred_values_come_first_and_what_agrees_is_trained_once() -> None:
    schedule = Schedule(study(), DATA)
    missing = schedule.missing({})
    assert [p.multiplier for p in missing] == sorted((p.multiplier for p in missing), key=lambda m: (abs(octave(m)), m))
    keys = [p.run.key for p in missing]
    assert len(keys) == len(set(keys))
    # base: one plan for all approaches and both axes; width: complete-mue, standard, the law; experts: complete-mue
    assert sum(p.multiplier == 1 for p in missing) == 2 * (1 + 3 + 1)


def test_a_valley_without_another_side_is_widened_as_far_as_it_reaches() -> None:
    schedule = Schedule(study(), DATA)

    def tried(minimum: float) -> set[float]:
        rows = trained(schedule, lambda p: 2.0 + 0.1 * (octave(p.multiplier) - minimum) ** 2)
        place = next(i for i, c in enumerate(schedule.cells) if c.approach.name == "standard" and "64" in c.target.name)
        return {p.multiplier for p in schedule.runs_of(place, rows)}

    assert tried(0.1) == {0.5, 1, 2}
    assert tried(1.2) == {0.5, 1, 2, 4}
    assert tried(-9) == {0.25, 0.5, 1, 2}  # reach = 4: no farther, however far the minimum


def test_diverged_runs_are_no_minimum_and_a_law_stays_at_its_value() -> None:
    schedule = Schedule(study(), DATA)
    rows = trained(schedule, lambda p: None if p.multiplier > 1 else 2.0 - p.multiplier)
    place = next(i for i, c in enumerate(schedule.cells) if c.approach.name == "standard" and "64" in c.target.name)
    assert {p.multiplier for p in schedule.runs_of(place, rows)} == {0.5, 1, 2}
    everything_diverged = trained(schedule, lambda p: None)
    assert not schedule.missing(everything_diverged)
    law = next(i for i, c in enumerate(schedule.cells) if c.approach.law)
    assert {p.multiplier for p in schedule.runs_of(law, rows)} == {1.0} or schedule.cells[law].target.name == "base"


def test_a_row_answers_for_every_approach_that_comes_to_its_values() -> None:
    schedule = Schedule(study(), DATA)
    one: Planned = schedule.missing({})[0]
    assert one.cell.target.name == "base"
    left = schedule.missing({one.run.key: row(one, 2.0)})
    assert one.run.key not in {p.run.key for p in left} and len(left) == len(schedule.missing({})) - 1
