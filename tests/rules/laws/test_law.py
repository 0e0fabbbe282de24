"""What a law reads of a model, its refusals and its ratios; what each law was published with is in test_published."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mue
from mue.plan.notes import CRITICAL_BATCHES
from mue.rules.laws.law import (
    LAWS,
    QUANTITIES,
    OutsideRangeError,
    Power,
    get_law,
    lr_law,
    quantity,
    span,
)
from mue.shapes import Block

DENSE = mue.Dense(width=64, ffn=128, layers=2, head_dim=16, vocab=1000, sequence=32)
MOE = mue.MoE.parse("8e2a1s", width=64, expert=32, layers=2, head_dim=16, vocab=1000, sequence=32)
RUN = mue.Training(batch=320, steps=100)
ALL = [(name, sets) for name in LAWS for sets in get_law(name).sets]


def test_quantities_are_those_counted_by_hand() -> None:
    attention, vectors = 4 * 64 * 64, 2 * 2 * 64 + 2 * 2 * 16 + 64
    expected = {"N": 2 * (attention + 3 * 64 * 128) + vectors, "d": 64, "L": 2, "E": 1, "S": 1, "A": 1, "B": 320}
    assert {name: quantity(name, DENSE, RUN) for name in expected} == expected
    assert quantity("N_a", DENSE, RUN) == expected["N"] and quantity("D", DENSE, RUN) == 32_000
    # 6 a matrix element and 12·L·d·s for attention, both for each token
    matrices = 2 * (attention + 3 * 64 * 128)
    assert quantity("C", DENSE, RUN) == (6 * matrices + 12 * 2 * 64 * 32) * 32_000
    assert quantity("R", DENSE, RUN) == pytest.approx(32_000 / expected["N"])
    one_expert, router = 3 * 64 * 32, 64 * 8
    assert quantity("N", MOE, RUN) == 2 * (attention + 9 * one_expert + router) + vectors
    assert quantity("N_a", MOE, RUN) == 2 * (attention + 3 * one_expert + router) + vectors
    assert (quantity("E", MOE, RUN), quantity("S", MOE, RUN), quantity("A", MOE, RUN)) == (8, 4, 3 / 9)
    assert set(QUANTITIES) >= {
        symbol for n, s in ALL for symbol in (*get_law(n).sets[s].exponents, *get_law(n).sets[s].ranges)
    }


def test_neither_vocabulary_nor_a_tied_head_counts() -> None:
    for symbol in ("N", "N_a", "C"):
        other = mue.Dense(width=64, ffn=128, layers=2, head_dim=16, vocab=5000, sequence=32, tied=True)
        assert quantity(symbol, other, RUN) == quantity(symbol, DENSE, RUN)


def test_what_the_run_must_say_and_what_blocks_may_not_differ_in() -> None:
    with pytest.raises(ValueError, match="needs D, tokens of the run: give training"):
        get_law("step-law").sets["lr"].at(DENSE, None)
    assert lr_law("ludziejewski").ratio((DENSE, None), (MOE, None)) < 1  # which reads no run
    mixed = mue.Mixed(
        64, (Block(layers=1, ffn=128), *(Block(layers=1, experts=n, active=2, expert=32) for n in (4, 8))), head_dim=16
    )
    with pytest.raises(OutsideRangeError, match="blocks differ in experts"):
        quantity("E", mixed, RUN)
    dense_first = mue.Mixed(
        64, (Block(layers=1, ffn=128), Block(layers=1, experts=4, active=2, expert=32)), head_dim=16
    )
    assert quantity("E", dense_first, RUN) == 4


@pytest.mark.parametrize(("name", "sets"), ALL)
def test_a_law_answers_inside_its_range_and_refuses_outside_with_the_range(name: str, sets: str) -> None:
    power = get_law(name).sets[sets]
    middle = {s: math.sqrt(max(low, 1e-3) * min(high, 1e30)) for s, (low, high) in power.ranges.items()}
    power.check(middle)
    for symbol, (low, high) in power.ranges.items():
        ends = ([low] if low > 0 else []) + ([high] if math.isfinite(high) else [])
        assert ends
        for end in ends:
            power.check({**middle, symbol: end})
            beyond = end * (0.99 if end == low else 1.01)
            with pytest.raises(OutsideRangeError) as refused:
                power.check({**middle, symbol: beyond})
            assert str(refused.value).startswith(f"{symbol} = ") and span((low, high)) in str(refused.value)


@pytest.mark.parametrize(("name", "sets"), ALL)
@given(factor=st.floats(1.01, 100), values=st.lists(st.floats(1e-3, 1e12), min_size=3, max_size=3))
def test_a_law_rises_and_falls_by_its_exponents(name: str, sets: str, factor: float, values: list[float]) -> None:
    power = get_law(name).sets[sets]
    assert power.exponents and len(power.exponents) <= 3
    at = dict(zip(power.exponents, values, strict=False))
    before = power.of(at)
    for symbol, exponent in power.exponents.items():
        after = power.of({**at, symbol: at[symbol] * factor})
        assert after / before == pytest.approx(factor**exponent, rel=1e-9)
        assert (after > before) == (exponent > 0)


def test_directions_that_all_laws_agree_on() -> None:
    """A larger model is never given a higher rate, more tokens always a larger batch; on tokens for the rate they disagree."""
    for name, sets in ALL:
        reads = get_law(name).sets[sets].exponents
        size = {"N", "N_a", "d", "L"} & set(reads)
        grows_with_the_run = {"D", "C"} & set(reads)
        if sets == "lr":
            assert all(reads[s] < 0 for s in size)
        else:
            assert not size and all(0.3 < reads[s] < 0.6 for s in grows_with_the_run)
    signs = {lr_law(n).exponents["D"] > 0 for n, s in ALL if s == "lr" and "D" in lr_law(n).exponents}
    assert signs == {True, False}


def test_a_ratio_has_no_constant_and_no_range() -> None:
    wide = mue.Dense(width=256, ffn=512, layers=2, head_dim=16, vocab=1000, sequence=32)
    for name in ("step-law", "zhou"):
        power = lr_law(name)
        bare = Power(power.exponents, None, {})
        assert power.ratio((DENSE, RUN), (wide, RUN)) == pytest.approx(bare.ratio((DENSE, RUN), (wide, RUN)), rel=1e-12)
        with pytest.raises(OutsideRangeError):  # the same models, asked for a rate
            power.at(wide, RUN)


def test_names_that_are_no_law_or_no_rate() -> None:
    with pytest.raises(ValueError, match=r"unknown fitted law 'steplaw'.*step-law"):
        lr_law("steplaw")
    with pytest.raises(ValueError, match="'zhang' sets no learning rate but critical batch"):
        lr_law("zhang")


@pytest.mark.parametrize(
    ("ends", "text"), [((512, 2048), "512 to 2048"), ((0, 2e9), "up to 2e+09"), ((2, math.inf), "2 and more")]
)
def test_ranges_as_they_are_read(ends: tuple[float, float], text: str) -> None:
    assert span(ends) == text


def test_a_plan_asks_every_law_of_ours_that_knows_a_critical_batch() -> None:
    assert set(CRITICAL_BATCHES) == {name for name, sets in ALL if sets == "critical batch"}


def test_every_law_is_sourced() -> None:
    for name in LAWS:
        law = get_law(name)
        assert law.name == name and law.fitted and any(c.isdigit() for c in law.source), name
        assert set(law.sets) <= {"lr", "batch", "critical batch"}
        assert all(power.note for sets, power in law.sets.items() if sets == "lr")
