"""What a plan warns of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import mue
from support.plans import BASE, TARGET, TUNED, make
from support.sde import SDE


def test_notes_warn() -> None:
    one = make(target=mue.MoE.parse("16e1a", width=256, expert=64, layers=8))
    assert any("router gets no gradient" in note for note in one.notes)
    assert not make(**SDE).notes
    assert any("kv heads" in n for n in make(target=replace(TARGET, kv_heads=2)).notes)
    assert any("gated" in n for n in make(target=replace(TARGET, gated=False)).notes)
    tied = make(rule="complete-mue-paper", target=replace(TARGET, tied=True))
    assert any("the embedding row wins" in n for n in tied.notes)
    for other, noted in (({"rule": "complete-mue"}, False), ({"rule": "complete-mue", "head": "paper"}, True)):
        same = mue.transfer(BASE, replace(TARGET, tied=True), TUNED, **other)
        assert any("the embedding row wins" in n for n in same.notes) == noted
    with pytest.raises(ValueError, match="leave it out"):
        make(target=replace(TARGET, output_multiplier=0.3))


def test_a_batch_below_one_sequence_is_asked_about() -> None:
    """Batches are tokens here and sequences in many trainers; neither the values nor the hash know of the question."""
    runs = {"base_training": mue.Training(256, 5000), "training": mue.Training(2**20, 20000)}
    asked = make(**runs)
    assert [n for n in asked.notes if "does it count sequences" in n] == [
        n for n in asked.notes if "the base's batch" in n
    ]
    assert any("give batch = 262,144" in note for note in asked.notes)
    short = make(base=replace(BASE, sequence=256), target=replace(TARGET, sequence=256), **runs)
    other = make(base_training=mue.Training(1024, 5000), training=mue.Training(1024, 20000))
    assert not any("does it count sequences" in note for note in (*short.notes, *other.notes))


@pytest.mark.parametrize(
    ("batch", "steps", "options", "noted"),
    [
        (2**21, 10_000, {}, True),  # 21 B tokens: the best batch by the fit is 0.45 M tokens, this is 4.6 times that
        (2**19, 40_000, {}, False),  # the same tokens at 1.15 times the best
        (860_000, 24_386, {}, False),  # an octave above the best is 907,850
        (960_000, 21_845, {}, True),
        (2**18, 80_000, {}, False),
        (2**21, 10_000, {"batch_exponent": 0}, False),  # rates that do not grow with the batch
        (2**21, 10_000, {"rule": "complete-mue-paper"}, True),
        (2**21, 10_000, {"rule": "standard"}, False),
    ],
)
def test_a_batch_far_above_the_best_is_warned_of(batch: int, steps: int, options: dict[str, Any], noted: bool) -> None:
    """Where the batch grows and rates with it: 2503.04715's fit of the best batch, an octave above which rates stop growing."""
    base = mue.Training(2**16, 40_000)
    notes = make(base_training=base, training=mue.Training(batch, steps), tuned=TUNED, **options).notes
    found = [n for n in notes if "Step Law" in n]
    assert len(found) == noted
    assert all("0.58·D^0.571" in n and "docs/findings/public-runs.md" in n and f"{batch:,}" in n for n in found)
    same = make(base_training=mue.Training(batch, 40_000), training=mue.Training(batch, steps), **options)
    assert not any("Step Law" in n for n in same.notes)  # the rate does not move: nothing to warn of


def test_what_no_rule_reads_is_said_where_it_changes() -> None:
    """Another vocabulary, another window, a head of its own: values stay as tuned, and the reader knows."""
    other = make(target=replace(TARGET, vocab=50257, sequence=4096, tied=True))
    assert any(
        "vocab 256 → 50257, sequence 1024 → 4096, tied False → True: no rule covers that" in n for n in other.notes
    )
    assert not any("no rule covers that" in n for n in make().notes)


def test_notes_make_no_other_plan() -> None:
    noted = make(base_training=mue.Training(256, 5000), training=mue.Training(256, 20000))
    assert noted.notes and replace(noted, notes=()).hash == noted.hash


def short(notes: tuple[str, ...]) -> list[str]:
    return [note.split("'s run is short")[0].removeprefix("the ") for note in notes if "is short for its betas" in note]


@pytest.mark.parametrize(
    ("steps", "target_steps", "betas", "options", "warned"),
    [
        (240, 240, (0.9, 0.95), {}, ["base"]),  # the same run twice: said once
        (240, 960, (0.9, 0.95), {}, ["base", "target"]),  # and the rule carries the fault along
        (240, 960, (0.9, 0.95), {"betas": "unchanged"}, ["base", "target"]),  # 1.04 % of 960
        (240, 1000, (0.9, 0.95), {"betas": "unchanged"}, ["base"]),  # 1 % exactly
        (999, 1000, (0.9, 0.95), {}, ["base", "target"]),
        (1000, 4000, (0.9, 0.95), {}, []),
        (4000, 16_000, (0.9, 0.99), {}, []),
        (4000, 1000, (0.9, 0.999), {"betas": "unchanged"}, ["base", "target"]),  # β2: a quarter of the run, all of it
        (10_000, 5000, (0.9, 0.999), {"betas": "unchanged"}, ["target"]),  # a fifth
        (10_000, 40_000, (0.98, 0.99), {"betas": "unchanged"}, []),
    ],
)
def test_betas_that_are_long_for_a_run_are_warned_of(
    steps: int, target_steps: int, betas: tuple[float, float], options: dict[str, str], warned: list[str]
) -> None:
    """Nobody tuned (0.9, 0.95) for a run of 240 steps, and a rule that stretches them makes it worse."""
    batch = 2**18
    runs = {"base_training": mue.Training(batch, steps), "training": mue.Training(batch, target_steps)}
    plan = make(tuned=TUNED.replace(betas=betas), **runs, **SDE | options)
    assert short(plan.notes) == warned
    assert replace(plan, notes=()).hash == plan.hash


def test_betas_are_warned_of_only_where_somebody_averages_over_steps() -> None:
    runs = {"base_training": mue.Training(2**18, 200), "training": mue.Training(2**18, 200)}
    assert short(make(**runs).notes) and not short(make().notes)  # without runs there are no steps
    assert not short(make(tuned=TUNED.replace(optimizer="lion"), **runs).notes)
    chain = mue.transfer(make(**runs), TARGET, training=mue.Training(2**18, 50_000), betas="unchanged")
    assert short(chain.notes) == ["base"]


@pytest.mark.parametrize(
    ("warmup", "steps", "beta2", "said"),
    [
        (0.05, 400, 0.95, ""),  # 20 steps, one average
        (0.05, 399, 0.95, "of 19.95 steps is shorter"),
        (0.01, 10_000, 0.999, "of 100 steps is shorter"),
        (0.0, 10_000, 0.95, "is missing, and so shorter"),
        (20, 400, 0.95, ""),
        (19, 400, 0.95, "of 19 steps is shorter"),
        (400, 400, 0.95, "is the target's whole run"),
    ],
)
def test_a_warmup_below_one_average_of_adams_is_noted(warmup: float, steps: int, beta2: float, said: str) -> None:
    tuned, run = TUNED.replace(warmup=warmup, betas=(0.9, beta2)), mue.Training(2**18, steps)
    plan = make(tuned=tuned, base_training=run, training=run)
    found = [note for note in plan.notes if "warmup" in note]
    assert len(found) == bool(said) and said in "".join(found)
    average = 1 / (1 - beta2)
    if "shorter" in said:
        assert f"1/(1-β2) = {average:.4g} steps" in found[0] and f"warmup = {average:.0f} (steps)" in found[0]
    line = dict(plan.header())["warmup"]
    assert line.endswith(f"steps of {steps:,}, {(warmup if warmup >= 1 else warmup * steps) / average:.4g} × 1/(1-β2)")
    assert replace(plan, notes=()).hash == plan.hash


def test_no_word_on_a_warmup_without_a_run_or_without_an_average_over_steps() -> None:
    run = mue.Training(2**18, 100)
    for plan in (
        make(base_training=None, training=None),
        make(tuned=TUNED.replace(optimizer="lion"), base_training=run, training=run),
    ):
        assert "warmup" not in dict(plan.header()) and not any("warmup" in note for note in plan.notes)
    # what counts is the target's run and the betas it is given there
    short = make(base_training=mue.Training(2**18, 10_000), training=mue.Training(2**18, 300))
    assert any("warmup of 15 steps" in note for note in short.notes)


def critical(**runs: mue.Training) -> list[str]:
    return [note for note in make(**runs).notes if "critical batch" in note]


def test_a_batch_beyond_the_critical_one_is_warned_of_by_the_nearest_estimate() -> None:
    base, target = mue.Training(2**15, 4000), mue.Training(2**18, 4000)
    known = replace(target, critical_batch=2**17)
    (said,) = critical(base_training=base, training=known)
    assert "262,144 tokens passes its critical batch, 131,072 tokens as measured:" in said
    assert not critical(base_training=base, training=replace(target, critical_batch=2**18))  # at it is not beyond it
    # of the base: it grows with the tokens, here eight times as many, whatever the size (2505.13738)
    grown = 2**16 * 8**0.462
    (said,) = critical(base_training=replace(base, critical_batch=2**16), training=target)
    assert f"{grown:,.0f} tokens as measured on the base, × ρ_D^0.462 (2505.13738)" in said
    assert not critical(base_training=replace(base, critical_batch=2**17), training=target)
    # a measurement stands before a law, on the target before one on the base
    assert not critical(base_training=replace(base, critical_batch=1), training=replace(target, critical_batch=2**20))


def test_without_a_measurement_the_laws_in_whose_range_a_target_is_speak() -> None:
    target = mue.Dense(width=1024, ffn=4096, layers=12)
    tokens = 2**33  # 57 for each parameter
    runs = [mue.Training(batch, tokens // batch) for batch in (2**18, 2**20, 2**23)]
    said = [
        [n for n in mue.transfer(BASE, target, TUNED, base_training=runs[0], training=run).notes if "critical" in n]
        for run in runs
    ]
    assert (
        said[0] == []
        and "by zhang, at which a loss takes 1.2 times the steps" in said[1][0]
        and "power-lines" not in said[1][0]
    )
    assert "by power-lines, at which a loss takes twice the tokens and " in said[2][0]
    assert not critical()  # the small target of these tests is nobody's


def test_a_measured_critical_batch_is_no_part_of_a_plans_meaning() -> None:
    run = mue.Training(2**18, 4000)
    plain, told = (make(base_training=r, training=r) for r in (run, replace(run, critical_batch=2**16)))
    assert plain.hash == told.hash and plain == told and run == replace(run, critical_batch=2**16)
    assert "critical_batch" not in plain.to_dict()["inputs"]["training"]
    assert told.to_dict()["inputs"]["training"]["critical_batch"] == 2**16
    with pytest.raises(ValueError, match=r"critical_batch .tokens, as mue noise measures it. must be a whole number"):
        mue.Training(2**18, 10, critical_batch=0)
