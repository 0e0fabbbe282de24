"""Ling (2507.17702): learning rate and batch of MoEs as powers of the training compute."""

from __future__ import annotations

from mue.rules.laws.law import LAWS, Law, Power

# The search, and the activation ratios that it was tried on afterwards (section 2.2, Figure 3).
RANGES = {"C": (3e17, 3e20), "A": (0.047, 0.109)}


@LAWS.register("ling", place=5)
def ling() -> Law:
    """η = 1.1576 · C^-0.1529 and B = 0.0694 · C^0.3644; B in tokens, as their grid of 2^18 to 2^21 says."""
    return Law(
        name="ling",
        title="Ling, Tian et al.",
        fitted="64 experts, 4 active, one shared; AdamW, weight decay 0.1, WSD",
        sets={
            "lr": Power({"C": -0.1529}, 1.1576, RANGES, "AdamW"),
            "batch": Power({"C": 0.3644}, 0.0694, RANGES),
        },
        source="arXiv 2507.17702, equation 3; C by its Appendix C, without embedding and head",
    )
