"""µP (Yang et al. 2022, arXiv 2203.03466, Table 8), as the authors' package ``mup`` applies it with MuAdamW.

Width only, dense only: it says nothing about experts, depth, batch or duration, and refuses them.
"""

from __future__ import annotations

from mue.rules.algebra import Monomial, ratio
from mue.rules.registry import RULES
from mue.rules.table import AUTHORS_CODE, PUBLISHED, Row, Rule

d, o, H = ratio("ρ_d"), ratio("ρ_o"), ratio("ρ_H")


@RULES.register("mup", place=5)
def mup() -> Rule:
    """Hidden matrices: std fan_in^-1/2, lr 1/fan_in, weight decay × fan_in (MuAdamW's default); head multiplier 1/ρ_d."""

    def hidden(fan_in: Monomial) -> Row:
        return Row(
            init_std=fan_in ** "-1/2",
            lr=fan_in**-1,
            # MuAdamW multiplies wd by width_mult unless told decoupled_wd=True (package mup 1.0)
            weight_decay=fan_in,
            source="2203.03466 Table 8 (std, lr); weight decay: package mup, MuAdamW; eps not scaled there",
            status=AUTHORS_CODE,
            marks={"init_std": PUBLISHED, "lr": PUBLISHED},
        )

    vector = Row(source="2203.03466 Table 8: input weights and biases unscaled", status=PUBLISHED)
    rows = dict.fromkeys(("embedding", "norm", "qk_norm", "bias", "final_norm", "head"), vector)
    rows |= {"attention_q": hidden(d), "attention_k": hidden(d), "attention_v": hidden(d), "attention_o": hidden(o)}
    # each matrix on its own fan-in: down reads H, not d
    rows |= {"ffn_up": hidden(d), "ffn_gate": hidden(d), "ffn_down": hidden(H)}
    return Rule(
        name="mup",
        title="µP (Yang et al. 2022)",
        source="arXiv 2203.03466, Table 8; package mup 1.0",
        rows=rows,
        head_multiplier=d**-1,
        routed=False,
        refuses={
            "moe": "µP as published has no answer for experts",
            "depth": "µP as published has no depth rule (use completep or complete-mue)",
            "batch": "µP as published has no batch rule",
            "duration": "µP as published has no duration rule",
        },
    )
