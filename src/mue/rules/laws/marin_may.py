"""Marin's law for its May recipe: the same form, fitted anew to another recipe."""

from __future__ import annotations

from mue.rules.laws.law import LAWS, Law, Power


@LAWS.register("marin-may", place=3)
def marin_may() -> Law:
    """η = 18.31 · 3/13 · D^-0.395 · d^-0.150 · √B, B in sequences of 4,096; what is tuned is MuonH's step, 13/3 of Adam's rate."""
    return Law(
        name="marin-may",
        title="Marin, May 2026",
        fitted="17 cells, R² 0.996: 256 experts, 4 active, one shared; MuonH; the exponent of B is assumed",
        sets={
            "lr": Power(
                {"d": -0.150, "D": -0.395, "B": 0.5},
                18.31 * 3 / 13 / 4096**0.5,
                {"d": (512, 1280), "R": (4, 240)},
                "Adam (MuonH × 13/3)",
            )
        },
        source="github.com/marin-community/marin, issue #5951, corrected fit of 2026-05-26; #6044",
    )
