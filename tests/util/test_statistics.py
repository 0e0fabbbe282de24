"""Student's quantile against values of a library that this one does without, and against its two closed forms; intervals of shares."""

from __future__ import annotations

import math

import pytest

from mue.util.statistics import share_interval, student_quantile

SCIPY = (  # scipy.stats.t.ppf(p, freedom), version 1.17
    (0.975, 1, 12.706204736174694),
    (0.975, 2, 4.302652729749462),
    (0.6, 3, 0.2766706623326898),
    (0.975, 4, 2.7764451051977934),
    (0.995, 7, 3.4994832973504924),
    (0.999, 15, 3.7328344253109),
    (0.975, 30, 2.0422724563012378),
    (0.9999, 5, 9.677566300882814),
    (0.95, 200, 1.6525081009108769),
)


@pytest.mark.parametrize(("p", "freedom", "value"), SCIPY)
def test_students_quantile(p: float, freedom: int, value: float) -> None:
    assert student_quantile(p, freedom) == pytest.approx(value, rel=1e-10)
    assert student_quantile(p, freedom + 1) < value * (1 - 1e-6)  # and not of another number of degrees


@pytest.mark.parametrize("p", [0.51, 0.75, 0.9, 0.975, 0.999])
def test_students_quantile_in_closed_form(p: float) -> None:
    assert student_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-10)
    assert student_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-10)


def test_students_quantile_becomes_the_normal_one() -> None:
    assert student_quantile(0.975, math.inf) == pytest.approx(1.959963984540054, abs=1e-12)
    assert student_quantile(0.975, 100_000) == pytest.approx(1.959963984540054, abs=1e-4)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (3, 10), (150, 160), (1, 1)])
def test_the_interval_of_a_share_is_where_a_normal_test_would_not_refuse_it(hits: int, n: int) -> None:
    share, low, high = share_interval(hits, n)
    assert share == hits / n and 0 <= low <= share <= high <= 1 and high > low
    for end in (low, high):
        if 0 < end < 1:
            assert abs(share - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959964, rel=1e-5)
