"""Monomials with exact rational exponents."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mue.rules.algebra import ONE, RATIOS, Monomial, ratio

powers = st.fractions(min_value=-3, max_value=3, max_denominator=6)
values = st.fixed_dictionaries({name: st.floats(0.1, 10) for name in RATIOS})


@st.composite
def monomials(draw: st.DrawFn) -> Monomial:
    result = ONE
    for name in draw(st.lists(st.sampled_from(list(RATIOS)), max_size=4)):
        result = result * ratio(name) ** draw(powers)
    return result


@given(monomials(), monomials(), powers, values)
def test_arithmetic_is_the_arithmetic_of_values(x: Monomial, y: Monomial, p: Fraction, at: dict[str, float]) -> None:
    assert math.isclose((x * y)(at), x(at) * y(at), rel_tol=1e-12)
    assert math.isclose((x / y)(at), x(at) / y(at), rel_tol=1e-12)
    assert math.isclose((x**p)(at), x(at) ** float(p), rel_tol=1e-11)
    assert math.isclose((1 / x)(at), 1 / x(at), rel_tol=1e-12)


@given(monomials(), monomials(), monomials())
def test_the_algebra_is_exact(x: Monomial, y: Monomial, z: Monomial) -> None:
    assert x * y == y * x and (x * y) * z == x * (y * z)
    assert x / x == ONE and (x**2) ** "1/2" == x
    assert hash(x * y) == hash(y * x)
    if x != ONE:
        assert x * y != y


def test_printed_as_the_papers_do() -> None:
    d, e = ratio("ρ_d"), ratio("ρ_e")
    assert str(d ** "-1/2" * e ** "1/2") == "ρ_d^-1/2 · ρ_e^1/2"
    assert str(ONE) == "1"
    assert str(2 * d) == "2 · ρ_d"
    assert (d ** "-1/2").exponent("ρ_d") == Fraction(-1, 2) and d.exponent("ρ_L") == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown ratio"):
        ratio("ρ_x")
    with pytest.raises(ValueError, match="no exact fractional power"):
        _ = (2 * ratio("ρ_d")) ** "1/2"
    with pytest.raises(KeyError):
        ratio("ρ_d")({})
    assert (2 * ratio("ρ_d")) ** 2 == 4 * ratio("ρ_d") ** 2
