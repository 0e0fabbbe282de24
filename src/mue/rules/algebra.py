"""Monomials: a coefficient times named ratios to exact rational powers.

Every entry of a transfer rule is one of these, so composition A → B → C is a sum of exponents, and a table can be
printed the way the papers print it. No torch, no floats in the exponents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

# The names a rule may read, in the order they are printed. Each is target over base, so 1 at the base.
RATIOS: dict[str, str] = {
    "ρ_d": "residual width d / d*",
    "ρ_o": "fan-in of the attention output, heads·d_head / (heads*·d_head*)",
    "ρ_H": "fan-in of one down projection, h / H*",
    "ρ_L": "depth L / L*",
    "ρ_N": "routed experts N / N*",
    "ρ_a": "active routed experts a / a*",
    "ρ_e": "active expansion (H_act/d) / (H_act*/d*)",
    "ρ_κ": "second moment of the gates against uniform ones (1 for normalised gates)",
    "ρ_B": "batch in tokens per step, B / B*",
    "ρ_D": "tokens of the run, B·T / (B*·T*)",
}
_ORDER = {name: i for i, name in enumerate(RATIOS)}

Exponent = int | Fraction | str


@dataclass(frozen=True)
class Monomial:
    """``coefficient · Π ratio**exponent`` with rational exponents.

    Built from :func:`ratio` and ``*``, ``/``, ``**``; equal monomials compare and hash equal.

    Examples:
        >>> str(ratio("ρ_d") ** "-1/2" * ratio("ρ_e") ** "1/2")
        'ρ_d^-1/2 · ρ_e^1/2'
    """

    coefficient: Fraction = Fraction(1)
    exponents: tuple[tuple[str, Fraction], ...] = ()

    def __mul__(self, other: Monomial | int | Fraction) -> Monomial:
        other = _monomial(other)
        powers = dict(self.exponents)
        for name, power in other.exponents:
            powers[name] = powers.get(name, Fraction(0)) + power
        return _build(self.coefficient * other.coefficient, powers)

    __rmul__ = __mul__

    def __truediv__(self, other: Monomial | int | Fraction) -> Monomial:
        return self * _monomial(other) ** -1

    def __rtruediv__(self, other: int | Fraction) -> Monomial:
        return _monomial(other) / self

    def __pow__(self, exponent: Exponent) -> Monomial:
        power = Fraction(exponent)
        # 2^(1/2) is no fraction; the tables never need one, for their coefficients are 1 (and 0).
        if self.coefficient != 1 and power.denominator != 1:
            raise ValueError(f"({self})^{power}: a coefficient other than 1 has no exact fractional power")
        coefficient = self.coefficient if self.coefficient == 1 else self.coefficient ** int(power)
        return _build(coefficient, {name: p * power for name, p in self.exponents})

    def __call__(self, ratios: Mapping[str, float]) -> float:
        """The value at ``ratios``; a missing ratio is a ``KeyError`` (our mistake, not a user's)."""
        value, powers = self._floats
        for name, power in powers:
            value *= float(ratios[name]) ** power
        return value

    @cached_property
    def _floats(self) -> tuple[float, tuple[tuple[str, float], ...]]:
        return float(self.coefficient), tuple((name, float(power)) for name, power in self.exponents)

    def exponent(self, name: str) -> Fraction:
        """The power of one ratio, 0 where it does not appear."""
        return dict(self.exponents).get(name, Fraction(0))

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        parts = [] if self.coefficient == 1 and self.exponents else [str(self.coefficient)]
        parts += [name if power == 1 else f"{name}^{power}" for name, power in self.exponents]
        return " · ".join(parts)


ONE = Monomial()


def ratio(name: str) -> Monomial:
    """The monomial ``name^1``; ``ValueError`` for a name that is not in :data:`RATIOS`."""
    if name not in RATIOS:
        raise ValueError(f"unknown ratio {name!r}; the known ones are {', '.join(RATIOS)}")
    return Monomial(exponents=((name, Fraction(1)),))


def _monomial(value: Monomial | int | Fraction) -> Monomial:
    return value if isinstance(value, Monomial) else Monomial(coefficient=Fraction(value))


def _build(coefficient: Fraction, powers: Mapping[str, Fraction]) -> Monomial:
    # in one order and without zero powers, so that equal monomials are equal tuples and print alike
    kept = sorted(((n, p) for n, p in powers.items() if p), key=lambda item: _ORDER[item[0]])
    return Monomial(coefficient, tuple(kept))
