"""Batch and duration: the SDE rule."""

from __future__ import annotations

from fractions import Fraction

from mue.rules.algebra import Monomial, ratio

B, D = ratio("ρ_B"), ratio("ρ_D")

AXIS_SOURCES = {
    "ρ_L": "CompleteP 2505.01618 Table 1",
    "ρ_B": "arXiv 2605.23893 Table 2, the SDE rule",
    "ρ_D": "arXiv 2605.23893 Table 2, the SDE rule",
}


def sde(duration_exponent: Fraction) -> Monomial:
    """s = ρ_B^1/2 · ρ_D^-q, the factor of rates and weight decay; at q = 1/2 the SDE factor √(ρ_B/ρ_D) = √(T*/T).

    eps takes 1/s and 1-β takes s², so that η·ε, λ/η and (1-β)/η² hold for every q; T·η² and η·λ·T only for 1/2.

    Args:
        duration_exponent: q. Theory says 1/2 (2205.10287), sweeps of others 0.28 to 0.32 (transfer-rules 5).
    """
    return B ** "1/2" * D**-duration_exponent


def horizon_note(duration_exponent: Fraction) -> tuple[str, ...]:
    """What is lost when the duration exponent is not the SDE's."""
    if duration_exponent == Fraction(1, 2):
        return ()
    return (
        f"duration_exponent = {duration_exponent}: T·η² and η·λ·T are no longer those of the base (both hold only at 1/2);"
        " η·ε, λ/η and (1-β)/η² still are",
    )
