"""Step Law (2503.04715): dense and MoE models, AdamW, one rate for all parameters."""

from __future__ import annotations

from mue.rules.laws.law import LAWS, Law, Power

# Of the published runs: dense models of 59 M to 1 B, MoEs of 2.15 B in all; 2 to 100 B tokens (docs/findings/public-runs.md).
N, D = (5.9e7, 2.2e9), (2e9, 1e11)


@LAWS.register("step-law", place=1)
def step_law() -> Law:
    """η = 1.79 · N^-0.713 · D^0.307 and B = 0.58 · D^0.571, N without embedding and head (of a MoE all experts)."""
    return Law(
        name="step-law",
        title="Step Law, Li et al.",
        fitted="3,700 models, dense and MoE; AdamW, weight decay 0.1, cosine to 1e-5",
        sets={
            "lr": Power({"N": -0.713, "D": 0.307}, 1.79, {"N": N, "D": D}, "AdamW"),
            "batch": Power({"D": 0.571}, 0.58, {"D": D}),
        },
        source="arXiv 2503.04715, its two formulas (N without vocabulary); github.com/step-law/steplaw, code/fit_tool.py",
    )
