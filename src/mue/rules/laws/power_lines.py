"""Power Lines (2505.13738): the best and the critical batch as powers of the tokens, whatever the size of the model."""

from __future__ import annotations

from mue.rules.laws.law import LAWS, Law, Power

SEQUENCE = 2048  # tokens in one of its sequences, which batches are counted in
RANGES = {"N_a": (0, 3.3e9), "R": (20, 1280)}


@LAWS.register("power-lines", place=9)
def power_lines() -> Law:
    """B = 0.0306 · D^0.383 and B_crit = 0.0471 · D^0.462, in sequences: at B_crit a run needs twice the tokens of a small batch."""
    return Law(
        name="power-lines",
        title="Power Lines, Bergsma et al.",
        fitted="dense models to 3.3 B, 20 to 1,280 tokens a parameter; µP, AdamW; sequences of 2,048",
        sets={
            "batch": Power({"D": 0.383}, 0.0306 * SEQUENCE, RANGES),
            "critical batch": Power({"D": 0.462}, 0.0471 * SEQUENCE, RANGES, "at which a loss takes twice the tokens"),
        },
        source="arXiv 2505.13738v2, Figure 1 and equations 6 and 7, as others' code quotes them (D for its D_min)",
    )
