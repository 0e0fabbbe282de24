"""Zhou et al. (2601.05049): a fit of the rate over size and tokens of MoEs, said to beat transfer."""

from __future__ import annotations

from mue.rules.laws.law import LAWS, Law, Power


@LAWS.register("zhou", place=7)
def zhou() -> Law:
    """η = 38.46 · N^-0.2219 · D^-0.3509, in units that no text we could read states, so that only ratios are taken from it."""
    return Law(
        name="zhou",
        title="Zhou et al.",
        fitted="MoEs only, R² 0.962; WSD; N taken as active parameters; tried at 1.3 B active and 500 B tokens",
        sets={
            "lr": Power(
                {"N_a": -0.2219, "D": -0.3509},
                None,
                {"E": (2, float("inf")), "N_a": (0, 1.3e9), "D": (0, 5e11)},
                "ratio to the base",
            )
        },
        source="arXiv 2601.05049, equation 6 as quoted at chatpaper.com/paper/224700 (constant 38.4588, units not seen)",
    )
