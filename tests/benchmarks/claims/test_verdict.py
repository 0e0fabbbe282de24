"""Verdicts on made-up rows: where an interval lies, pairs by seed, controls, power, and what is missing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claims.spec import CRITERIA, Check, Claims, Value, read_claims
from claims.verdict import CONTROL, FAILS, HOLDS, NO_POWER, NOT_MEASURED, UNDECIDED, judge
from support.claims import BASE, claims_folder, rows_of


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> Claims:
    folder = tmp_path_factory.mktemp("claims")
    return read_claims(claims_folder(folder), _base(folder))


def _base(folder: Path) -> Path:
    (folder / "base").mkdir()
    (folder / "base" / "base.toml").write_text(BASE, encoding="utf-8")
    return folder / "base" / "base.toml"


def verdict(claims: Claims, a: list[float], b: list[float], worse: list[float]) -> str:
    """Of "better" (a minus b below 0.01), whose control is that "worse" minus b is above it."""
    return judge(claims, claims.all[0], rows_of(claims, {"a": a, "b": b, "worse": worse})).verdict


def test_a_pair_takes_out_what_a_seed_does_to_both(claims: Claims) -> None:
    noise = [0.0, 0.5, -0.4]
    a, b, worse = ([level + n for n in noise] for level in (2.0, 2.1, 2.4))
    assert verdict(claims, a, b, worse) == HOLDS
    # unpaired the same numbers decide nothing: this is the negative control of the pairing
    assert verdict(claims, a, b[1:] + b[:1], worse) in (CONTROL, NO_POWER)


def test_beyond_the_bound_it_fails_and_astride_of_it_nothing_is_known(claims: Claims) -> None:
    b, worse = [2.0, 2.0, 2.0], [2.5, 2.6, 2.55]
    assert verdict(claims, [2.2, 2.21, 2.22], b, worse) == FAILS
    assert verdict(claims, [2.005, 2.01, 2.018], b, worse) == UNDECIDED  # ± 0.016, as narrow as was wanted
    assert verdict(claims, [1.9, 2.1, 2.03], b, worse) == NO_POWER


def test_without_its_control_a_claim_has_no_verdict(claims: Claims) -> None:
    assert verdict(claims, [1.9, 1.9, 1.9], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0]) == CONTROL


def test_a_missing_seed_is_not_measured_and_a_diverged_one_is_endless(claims: Claims) -> None:
    rows = rows_of(claims, {"a": [1.9, 1.9, 1.9], "b": [2.0, 2.0, 2.0], "worse": [2.4, 2.4, 2.4]})
    gone = dict(rows)
    del gone[claims.arms["group", "a"].identity(2)]
    judged = judge(claims, claims.all[0], gone)
    assert judged.verdict == NOT_MEASURED and judged.checks[0].seeds == 2
    rows[claims.arms["group", "a"].identity(1)] = {"seen": {"loss": None}}
    judged = judge(claims, claims.all[0], rows)
    assert judged.verdict == FAILS and judged.checks[0].mean is not None and judged.checks[0].mean.value == math.inf


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3))
def test_the_interval_is_students(claims: Claims, a: list[float]) -> None:
    mean = judge(claims, claims.all[1], rows_of(claims, {"a": a})).checks[0].mean
    assert mean is not None
    centre = sum(a) / 3
    spread = math.sqrt(sum((x - centre) ** 2 for x in a) / 2)
    assert mean.value == pytest.approx(centre, abs=1e-9)
    assert mean.half == pytest.approx(
        4.302653 * spread / math.sqrt(3), abs=1e-6
    )  # t of two degrees of freedom, from tables


@pytest.mark.parametrize(
    ("a", "within", "apart"),
    [
        ([0.0, 0.01, -0.01], HOLDS, FAILS),
        ([2.0, 2.01, 1.99], FAILS, HOLDS),
        ([-2.0, -2.01, -1.99], FAILS, HOLDS),
        ([0.9, 1.0, 1.1], UNDECIDED, UNDECIDED),
    ],
)
def test_within_and_apart_are_opposites(claims: Claims, a: list[float], within: str, apart: str) -> None:
    judged = judge(claims, claims.all[1], rows_of(claims, {"a": a}))
    assert [outcome.verdict for outcome in judged.checks] == [within, apart]


def test_on_the_bound_a_value_is_within_and_neither_below_nor_above(claims: Claims) -> None:
    """Two arms that are one arm by mistake show nothing."""
    checks = tuple(Check(Value("a", "loss"), "", 0.0, criterion, 1.0) for criterion in CRITERIA)
    claim = replace(claims.all[1], checks=checks)
    for a, verdicts in (
        (1.0, {"below": FAILS, "above": FAILS, "within": HOLDS, "apart": FAILS}),
        (1.0 - 1e-9, {"below": HOLDS, "above": FAILS, "within": HOLDS, "apart": FAILS}),
        (1.0 + 1e-9, {"below": FAILS, "above": HOLDS, "within": FAILS, "apart": HOLDS}),
    ):
        judged = judge(claims, claim, rows_of(claims, {"a": [a, a, a]}))
        assert {outcome.check.criterion: outcome.verdict for outcome in judged.checks} == verdicts


def test_a_ratio_to_a_diverged_run_says_nothing(claims: Claims) -> None:
    ratio = Check(Value("a", "loss"), "over", Value("b", "loss"), "below", 0.5)
    rows = rows_of(claims, {"a": [1.0, 1.0, 1.0], "b": [3.0, 3.0, 3.0]})
    assert judge(claims, replace(claims.all[1], checks=(ratio,)), rows).checks[0].verdict == HOLDS
    rows[claims.arms["group", "b"].identity(1)] = {"seen": {"loss": None}}
    assert judge(claims, replace(claims.all[1], checks=(ratio,)), rows).checks[0].verdict == UNDECIDED
