"""Marin's law for its August recipe: the third fit of one form within half a year."""

from __future__ import annotations

from mue.rules.laws.law import LAWS, Law, Power


@LAWS.register("marin-august", place=4)
def marin_august() -> Law:
    """η = 34.35 · 3/13 · D^-0.346 · d^-0.345 · √B, B in sequences of 8,192; what is tuned is MuonH's step, 13/3 of Adam's rate."""
    return Law(
        name="marin-august",
        title="Marin, August 2026",
        fitted="122 of 150 runs, R² 0.978: 128 experts, 4 active, two shared; MuonH; the exponent of B is assumed",
        sets={
            "lr": Power(
                {"d": -0.345, "D": -0.346, "B": 0.5},
                34.35 * 3 / 13 / 8192**0.5,
                {"d": (512, 2048), "R": (30, 600)},
                "Adam (MuonH × 13/3)",
            )
        },
        source="github.com/marin-community/marin, issue #7856 (comment of 2026-08-05), #8003; MoeHeuristic of moe_hero_ep",
    )
