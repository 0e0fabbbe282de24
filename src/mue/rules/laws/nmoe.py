"""nmoe: exponents read off the rates that four published models of one family were trained with."""

from __future__ import annotations

from mue.rules.laws.law import LAWS, Law, Power


@LAWS.register("nmoe", place=8)
def nmoe() -> Law:
    """η ∝ d^-0.35 · L^-0.58 · S^0.17, through the smallest of the four: 8.6e-4 at d1280, 12 layers, 6 of 64 experts."""
    return Law(
        name="nmoe",
        title="nmoe (Modal)",
        fitted="the published rates of four models, 3 B to 671 B in all, and no sweep; AdamW; neither tokens nor batch in it",
        sets={
            "lr": Power(
                {"d": -0.35, "L": -0.58, "S": 0.17},
                8.6e-4 / (1280**-0.35 * 12**-0.58 * (64 / 6) ** 0.17),
                {"d": (1280, 7168), "L": (12, 61), "S": (64 / 6, 32)},
                "AdamW",
            )
        },
        source="github.com/modal-projects/nmoe, its hp_scaling.md at 9172f96, Fitted Coefficients and Validation",
    )
