"""CompleteP (Dey et al. 2025, arXiv 2505.01618 v4), Table 1: width and depth of a dense model.

The table's columns, with m_N = ρ_d and m_L = ρ_L; the FFN ratio H/d is the base's, and the paper says nothing about
experts, batch or duration. Its code (EleutherAI/nanoGPT-mup, branch completep) multiplies eps globally, embedding and head
too; the table speaks of the residual blocks only, and is what stands here.
"""

from __future__ import annotations

from fractions import Fraction

from mue.rules.algebra import ONE, ratio
from mue.rules.registry import RULES
from mue.rules.roles import of_kind
from mue.rules.table import PUBLISHED, Row, Rule

N, o, L = ratio("ρ_d"), ratio("ρ_o"), ratio("ρ_L")

NO_EXPERTS = "CompleteP as published has no answer for experts (use complete-mue)"
FIXED_RATIO = "CompleteP keeps the ratio of FFN to residual width, H/d, as the base has it"


@RULES.register("completep", place=3)
def completep(depth_exponent: Fraction = Fraction(1)) -> Rule:
    """CompleteP at α = 1; its variant at α = 1/2 is the one the paper compares with."""
    α = depth_exponent
    inside = L ** (α - 1)  # rates of everything inside a block
    table = "2505.01618 Table 1"

    hidden = Row(
        init_std=N ** "-1/2",
        lr=N**-1 * inside,
        weight_decay=N,
        eps=N**-1 * L**-α,
        source=f"{table}: hidden weights",
        status=PUBLISHED,
    )
    out = Row(
        init_std=o ** "-1/2",
        lr=o**-1 * inside,
        weight_decay=o,
        eps=o**-1 * L**-α,
        source=f"{table}: hidden weights, on the fan-in heads·d_head",
        status=PUBLISHED,
    )
    vector = Row(lr=inside, eps=N**-1 * L**-α, source=f"{table}: pre-LN and hidden biases", status=PUBLISHED)
    outside = "eps is given for residual blocks only"
    return Rule(
        name="completep",
        title="CompleteP",
        source="arXiv 2505.01618, Table 1",
        rows={
            "embedding": Row(source=f"{table}: embedding; {outside}", status=PUBLISHED),
            **dict.fromkeys(of_kind("attention"), hidden),
            "attention_o": out,
            "ffn_up": hidden,
            "ffn_gate": hidden,
            "ffn_down": hidden,
            "norm": vector,
            "qk_norm": vector,
            "bias": vector,
            "final_norm": Row(lr=ONE, source=f"{table}: final LN; {outside}", status=PUBLISHED),
            "head": Row(source=f"{table}: unembedding, with the multiplier 1/m_N; {outside}", status=PUBLISHED),
        },
        # at α = 1 the only depth factor that is left beside eps (2505.01618, Table 1)
        residual_multiplier=L**-α,
        head_multiplier=N**-1,
        routed=False,
        refuses={
            "moe": NO_EXPERTS,
            "expansion": FIXED_RATIO,
            "batch": "CompleteP as published has no batch rule (use complete-d-p or complete-mue)",
            "duration": "CompleteP as published has no duration rule (use complete-d-p or complete-mue)",
        },
        spectral=True,
    )
