"""µP for MoE width scaling (Małaśnicki et al., arXiv 2508.09752), as far as it could be confirmed.

The abstract says that the learning rate transfers across width and across the number of experts, not across granularity.
The table itself was not read: experts as hidden weights and the router as an output-like weight (here in its multiplier-free
form: std 1/n, lr 1/n) are what two secondary sources agree on. Weight decay and eps are not given anywhere.
"""

from __future__ import annotations

from mue.rules.algebra import ONE, Monomial, ratio
from mue.rules.registry import RULES
from mue.rules.roles import of_kind
from mue.rules.table import Row, Rule

n, o, h = ratio("ρ_d"), ratio("ρ_o"), ratio("ρ_H")


@RULES.register("malasnicki", place=7)
def malasnicki() -> Rule:
    """Width at fixed h/d and a; the number of experts as the abstract says."""

    def row(name: str, std: Monomial = ONE, lr: Monomial = ONE) -> Row:
        source = f"2508.09752, from secondary sources: {name}"
        return Row(init_std=std, lr=lr, source=source, unknown=("weight_decay", "eps"))

    def vector(name: str) -> Row:
        return Row(source=f"2508.09752, from secondary sources: {name}", unknown=("eps",))

    def hidden(fan_in: Monomial) -> Row:
        return row("hidden weights", fan_in ** "-1/2", fan_in**-1)

    fixed = "the derivation keeps {0} fixed"
    return Rule(
        name="malasnicki",
        title="µP for MoE (Małaśnicki et al.)",
        source="arXiv 2508.09752, abstract and secondary sources",
        rows={
            "embedding": row("embedding unscaled"),
            **dict.fromkeys(of_kind("attention"), hidden(n)),
            "attention_o": hidden(o),
            "ffn_up": hidden(n),
            "ffn_gate": hidden(n),
            "ffn_down": hidden(h),
            "expert_up": hidden(n),
            "expert_gate": hidden(n),
            "expert_down": hidden(h),
            # std const, forward 1/n, lr const, folded by c = 1/n (2508.09752)
            "router": row("router as an output-like weight, its multiplier folded", n**-1, n**-1),
            "router_bias": Row(source="not mentioned; not an optimizer parameter"),
            "norm": vector("vectors unscaled"),
            "qk_norm": vector("vectors unscaled"),
            "bias": vector("vectors unscaled"),
            "final_norm": vector("vectors unscaled"),
            "head": row("unembedding with multiplier 1/n"),
        },
        head_multiplier=n**-1,
        routed=False,
        refuses={
            "depth": "Małaśnicki et al. give no depth rule",
            "dense to moe": "Małaśnicki et al. transfer between MoEs, not from a dense proxy (use complete-mue)",
            "active": fixed.format("the number of active experts"),
            "granularity": "Małaśnicki et al. report that the rate does not transfer across granularity, h/d",
            "gates": "Małaśnicki et al. do not treat other gates",
            "batch": "Małaśnicki et al. give no batch rule",
            "duration": "Małaśnicki et al. give no duration rule",
        },
    )
