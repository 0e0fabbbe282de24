"""Marin (marin-community/marin): figures that its issues print, each with its place. Small tables, quoted; no file to read.

Other optimizers (MuonH: Muon on a sphere, no weight decay) and another schedule than Step Law's; batch and width move together.
"""

from __future__ import annotations

import numpy as np

from mue.util.statistics import student_quantile

# Issue #5951, comment of 2026-05-26, "Verification": best multiplier of the heuristic rate by width and tokens per active parameter.
HEURISTIC_TOKENS = -0.2813  # of the heuristic that was multiplied (#5818, description)
MULTIPLIERS = {
    512: {10: 1.199, 20: 1.032, 60: 0.904, 120: 0.849, 240: 0.811},
    768: {10: 1.106, 20: 1.036, 60: 0.921},
    1024: {10: 1.029, 20: 0.947},
    1280: {10: 1.036, 20: 0.943, 60: 0.858, 120: 0.817},
}
# Issue #5178, comment of 2026-04-25: losses (Paloma macro) at d512 by multiplier of the rate, depth-µP, AdamH.
DEPTH_MUP_D512 = {
    0.25: 4.0652,
    0.354: 3.9475,
    0.5: 3.8671,
    0.707: 3.8302,
    1.0: 3.8188,
    1.41: 3.8284,
    2.0: 3.8695,
    2.83: 3.9301,
}


def tokens_slope() -> dict[str, object]:
    """Octaves of lr* per doubling of tokens at fixed batch: a line with a constant for each width; Student's interval."""
    rows = [(width, np.log2(r), np.log2(m)) for width, table in MULTIPLIERS.items() for r, m in table.items()]
    widths = list(MULTIPLIERS)
    design = np.array([[*(float(w == width) for w in widths), x] for width, x, _ in rows])
    y = np.array([m for *_, m in rows])
    coefficients, *_ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(y) - design.shape[1]
    variance = float(((y - design @ coefficients) ** 2).sum()) / freedom
    half = student_quantile(0.975, freedom) * float(np.sqrt(variance * np.linalg.inv(design.T @ design)[-1, -1]))
    slope = HEURISTIC_TOKENS + float(coefficients[-1])
    return {"slope": slope, "interval": [slope - half, slope + half], "cells": len(y)}


def curvature() -> float:
    """Nats per octave² at d512, from the parabola through the runs within 1.5 octaves of the lowest."""
    x, y = np.log2(list(DEPTH_MUP_D512)), np.array(list(DEPTH_MUP_D512.values()))
    near = abs(x) <= 1.55
    return float(2 * np.polyfit(x[near], y[near], 2)[0])
