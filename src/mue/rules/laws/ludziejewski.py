"""Ludziejewski et al. (2502.05172): the peak rate of dense models and MoEs, lower with more experts."""

from __future__ import annotations

import math

from mue.rules.laws.law import LAWS, Law, Power


@LAWS.register("ludziejewski", place=6)
def ludziejewski() -> Law:
    """ln η = 8.39 - 0.81 · ln N_a - 0.25 · ln E."""
    return Law(
        name="ludziejewski",
        title="Ludziejewski et al.",
        fitted="1 and 8 experts of top-1 MoEs, tried on 4 and 32; AdamW; neither tokens nor batch in it",
        sets={
            "lr": Power(
                {"N_a": -0.81, "E": -0.25},
                math.exp(8.39),
                # 13·L·d² of the smallest and the largest model in the listing of Appendix E: L8 d512, L36 d2304
                {"N_a": (13 * 8 * 512**2, 13 * 36 * 2304**2), "E": (1, 32)},
                "AdamW",
            )
        },
        source="arXiv 2502.05172, equation 8; Figure 7 and Appendix E for its range",
    )
