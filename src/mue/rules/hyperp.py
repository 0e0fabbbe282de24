"""HyperP (Ren et al., arXiv 2603.28743) for MuonH, as far as the spec goes: depth, batch and tokens of a dense model.

Every matrix stays on the Frobenius sphere it started on, W ← ‖W‖·normalize(W - lr·‖W‖·U/‖U‖), so a rate is relative and
needs no width; lr × √(L*/L), × √(B/B*), × (D/D*)^-0.32, weight decay 0, both residual branches divided by √(2L). What its
code (microsoft/ArchScale) does outside the matrices the spec does not say; those cells are left as tuned and marked.
"""

from __future__ import annotations

from fractions import Fraction

from mue.rules.algebra import ratio
from mue.rules.registry import RULES
from mue.rules.roles import of_kind
from mue.rules.table import PUBLISHED, ZERO, Row, Rule

L, B, D = ratio("ρ_L"), ratio("ρ_B"), ratio("ρ_D")


@RULES.register("hyperp", place=12)
def hyperp() -> Rule:
    """For ``optimizer = "hyperball"`` only."""
    matrix = Row(
        # 0.32 is their measured exponent of duration, where theory has 1/2 (2603.28743)
        lr=L ** "-1/2" * B ** "1/2" * D ** Fraction(-32, 100),
        weight_decay=ZERO,
        source="2603.28743 and ArchScale: MuonH matrices; init not given (the sphere keeps whatever norm it has)",
        status=PUBLISHED,
        unknown=("init_std",),
    )
    rest = Row(
        source="2603.28743: outside MuonH's matrices, not in the spec",
        unknown=("init_std", "lr", "weight_decay", "eps"),
    )
    vector = Row(source="2603.28743: outside MuonH's matrices, not in the spec", unknown=("lr", "eps"))
    return Rule(
        name="hyperp",
        title="HyperP (MuonH)",
        source="arXiv 2603.28743; microsoft/ArchScale",
        rows={
            "embedding": rest,
            **dict.fromkeys(of_kind("attention"), matrix),
            "ffn_up": matrix,
            "ffn_gate": matrix,
            "ffn_down": matrix,
            "norm": vector,
            "qk_norm": vector,
            "bias": vector,
            "final_norm": vector,
            "head": rest,
        },
        unanswered=dict.fromkeys(
            ("modulation", "final_modulation"),
            "HyperP keeps every matrix on the sphere it started on, and adaLN-zero's modulations start at 0, where there is none",
        ),
        residual_multiplier=L ** "-1/2",
        routed=False,
        refuses={
            "moe": "HyperP's experts need its SqrtGate (weights √π, and √½ on routed and shared), which these plans do not carry",
            "expansion": "HyperP's rates were stated at one ratio of FFN to residual width",
        },
        optimizer="hyperball",
    )
