"""Marin's first law for its MoE ladder (README of experiments/grug/moe, version 16)."""

from __future__ import annotations

from mue.rules.laws.law import LAWS, Law, Power


@LAWS.register("marin", place=2)
def marin() -> Law:
    """η = 1.63 · D^-0.2813 · d^-0.3678 · √B, B in sequences of 4,096: 1.63/√4096 with B in tokens."""
    return Law(
        name="marin",
        title="Marin, March 2026",
        fitted="186 runs, R² 0.995: 64 experts, 4 active, one shared; AdamH, WSD; the exponent of B is assumed",
        sets={
            "lr": Power(
                {"d": -0.3678, "D": -0.2813, "B": 0.5},
                1.63 / 4096**0.5,
                # the widths and budgets of the sweep over FLOPs that these rates were used in (#4447)
                {"d": (512, 2048), "C": (1e18, 3e20)},
                "Adam (AdamH × 13/3)",
            )
        },
        source="github.com/marin-community/marin, experiments/grug/moe/README.md, Scaling heuristic; issue #4447",
    )
